"""A device that is out of memory, as one line: which program, its bytes, what makes it smaller."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

import jax

from speciarl_jax.config.schema import Config
from speciarl_jax.errors import TrainingStopped

# jaxlib's own error comes out as a ValueError once torch is loaded in the same process.
KINDS = (jax.errors.JaxRuntimeError, MemoryError, ValueError)
_LOADING = "loading"
_SCORING = "evaluate.py"
# Who calls a program -> its name. The innermost caller on the stack counts.
_CALLERS = {
    "open_session": _LOADING,
    "initial_state": _LOADING,
    "encode": "encode",
    "encode_by_size": "encode",
    "start": "prefill",
    "_decode_all": "decode",
    "_logprobs": "log-probs",
    "_start_updates": "update",
    "finish_update": "update",
}
# Name -> compiled functions that it consists of.
_FUNCTIONS = {
    "encode": ("encode_images",),
    "prefill": ("prefill", "start"),
    "decode": ("decode_chunk", "shrink", "widen"),
    "log-probs": ("batch_logprobs",),
    "update": ("update_step", "_accumulate", "_apply"),
}
# Settings that make it smaller; a run may be resumed with other values of most of them.
_REMEDIES = {
    _LOADING: ("mesh.fsdp", "mesh.tensor"),
    "encode": ("data.max_pixels", "mesh.fsdp"),
    "prefill": ("rollout.max_cache_mb", "mesh.fsdp"),
    "decode": ("rollout.max_cache_mb", "mesh.fsdp"),
    "log-probs": ("train.prompts_per_micro_batch", "train.logprob_chunk_tokens"),
    "update": ("train.prompts_per_micro_batch", "model.remat"),
}
_ADVICE = {
    "mesh.fsdp": "raise",
    "mesh.tensor": "raise",
    "rollout.max_cache_mb": "set (MiB of a device for a rollout)",
    "model.remat": "set to full",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, could not give the memory that was asked for."""
    is_of_device = isinstance(error, KINDS) and "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError) or is_of_device


@contextlib.contextmanager
def told_memory(config: Config) -> Iterator[None]:
    """An error that `is_out_of_memory` as one line.

    Raises:
        TrainingStopped: instead of it.
    """
    try:
        yield
    except KINDS as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(f"{explain(error, config)}; then the same command again") from error


def planned_bytes(program: str) -> int:
    """What XLA has planned for a program, on one device: the largest of those compiled so far.

    Arguments, results and temporaries; 0 where none is compiled yet, as then its compilation has
    failed and the error itself has XLA's figures.
    """
    modules = {f"jit_{function}" for function in _FUNCTIONS.get(program, ())}
    largest = 0
    for executable in jax.devices()[0].client.live_executables():
        if modules & {module.name for module in executable.hlo_modules()}:
            plan = executable.get_compiled_memory_stats()
            size = plan.argument_size_in_bytes + plan.output_size_in_bytes
            size += plan.temp_size_in_bytes - plan.alias_size_in_bytes
            largest = max(largest, size)
    return largest


def explain(error: BaseException, config: Config) -> str:
    """One line for an error that `is_out_of_memory`.

    Args:
        error: with its traceback, which says whose program it was.
        config: the recipe, for the present values of the settings.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "speciarl_jax" in frame.filename]
    names = [_CALLERS[frame.name] for frame in ours if frame.name in _CALLERS]
    program = names[-1] if names else "step"
    settings = _REMEDIES.get(program, _REMEDIES["update"])
    if any(frame.filename.endswith(_SCORING) for frame in ours):
        settings = ("eval.prompts_per_batch", settings[0])
    asked = re.search(r"allocat\w* (\d+)", str(error))
    sizes = []
    if planned := planned_bytes(program):
        sizes.append(f"planned {planned / 2**30:.2f} GiB")
    if asked:
        sizes.append(f"asked for {int(asked[1]) / 2**30:.2f} GiB")
    size = f" ({', '.join(sizes)})" if sizes else ""
    advice = " or ".join(_advice(config, name) for name in settings)
    return f"out of memory in the program {program!r}{size}: {advice}"


def _advice(config: Config, name: str) -> str:
    section, _, field = name.partition(".")
    value = getattr(getattr(config, section), field)
    return f"{_ADVICE.get(name, 'lower')} {name} (now {value})"
