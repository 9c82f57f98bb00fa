"""From a run directory back to a policy: for `eval --checkpoint`, `export` and `tiny ship`."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys

from etils import epath
from flax import nnx

from speciarl_jax.config.old_runs import without_dropped
from speciarl_jax.config.schema import Config, LoraConfig
from speciarl_jax.convert import adapter
from speciarl_jax.files import read_json
from speciarl_jax.learner.optimizer import make_optimizer
from speciarl_jax.policy.model import Policy
from speciarl_jax.run.checkpoint import Checkpoints
from speciarl_jax.run.session import Session, initial_state, open_session
from speciarl_jax.run.storage import open_run_dir
from speciarl_jax.types import JsonObject

STEP_PREFIX = "step_"  # of the folder of an evaluation within training


def read_config(workdir: pathlib.Path) -> Config:
    """The recipe that a run directory was trained with.

    Raises:
        ValueError: no run there, or one of another version whose fields differ (see
            `config.old_runs.DROPPED` for those that may).
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise ValueError(f"{workdir}: no run there (config.json is missing)")
    config = Config()
    settings = read_json(file, "put that of another run of the recipe there")
    _fill(config, without_dropped(settings, str(file)), str(file))
    return config


def _fill(target: object, values: JsonObject, place: str) -> None:
    for name, value in values.items():
        if not hasattr(target, name):
            raise ValueError(f"{place}: unknown field {name!r}; written by another version?")
        old = getattr(target, name)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(f"{place}: {name}={value!r}, expected an object")
            _fill(old, value, f"{place}: {name}")
        else:
            if isinstance(old, tuple) and isinstance(value, list):
                value = tuple(value)
            setattr(target, name, value)


def _restored(session: Session, folder: epath.PathLike, step: int | None) -> tuple[Session, int]:
    """The session with a checkpoint's weights, and its step; None: the newest that can be read."""
    if not epath.Path(folder).is_dir():
        raise ValueError(f"{folder}: no checkpoints; train the run, or give a model directory")
    keep = session.config.train.keep_checkpoints
    with contextlib.closing(Checkpoints(folder, keep)) as checkpoints:
        if step is not None and step not in checkpoints.steps():
            raise ValueError(
                f"{folder}: no checkpoint of step {step}; there are {checkpoints.steps()}"
            )
        like = initial_state(session, make_optimizer(session.config.optim, 1), {})
        state, skipped = checkpoints.restore(like, step)
    for line in skipped:
        print(f"warning: {line}; using step {state.step}", file=sys.stderr)
    parts = dataclasses.replace(session.parts, trainable=state.trainable)
    return dataclasses.replace(session, parts=parts), state.step


def load_run(workdir: pathlib.Path) -> tuple[Policy, LoraConfig | None, pathlib.Path]:
    """A run's newest checkpoint, for `speciarl export`.

    Returns:
        (policy with its adapter, the adapter's settings or None if base weights were trained,
        directory of the base model).

    Raises:
        ValueError: no run or no readable checkpoint there.
    """
    config = read_config(workdir)
    session = open_session(config)
    session, _ = _restored(session, open_run_dir(workdir).checkpoints, None)
    parts = session.parts
    policy = nnx.merge(parts.graphdef, parts.trainable, parts.frozen)
    has_adapter = not (config.model.train_base or config.model.train_vision)
    return policy, config.lora if has_adapter else None, session.model_dir


def open_checkpoint(
    config: Config, folder: epath.PathLike, checkpoint: str, recipe_dir: pathlib.Path | None
) -> tuple[Session, str, str, int]:
    """Opens the weights that ``--checkpoint`` names; see `EvalOptions`.

    Args:
        config: the recipe; its model or its `lora` section follows what is opened.
        folder: checkpoints of the run.
        checkpoint: ``base``, ``latest``, a step, or the directory of a model or an adapter.
        recipe_dir: folder of the recipe, for its prompts.

    Returns:
        The session with these weights, the name of the evaluation's folder, the name of the
        weights for `evaluate` ("" for the run's own), and their training step.

    Raises:
        ValueError: no such checkpoint, or a directory that is neither a model nor an adapter.
    """
    if checkpoint == "base":
        return open_session(config, recipe_dir), "base", "", 0
    if checkpoint == "latest" or checkpoint.isdigit():
        session = open_session(config, recipe_dir)
        wanted = int(checkpoint) if checkpoint.isdigit() else None
        session, step = _restored(session, folder, wanted)
        return session, f"{STEP_PREFIX}{step:06d}", "", step
    directory = pathlib.Path(checkpoint)
    if (directory / adapter.CONFIG_FILE).is_file():
        session = open_session(config, recipe_dir, adapter_dir=directory)
    elif (directory / "config.json").is_file():
        config.model.path = checkpoint
        session = open_session(config, recipe_dir)
    else:
        raise ValueError(
            f"--checkpoint={checkpoint}: expected latest, base, a step number, a Hugging Face "
            f"model directory (config.json) or a PEFT adapter directory ({adapter.CONFIG_FILE})"
        )
    return session, directory.resolve().name, _directory_weights(directory), 0


def _directory_weights(directory: pathlib.Path) -> str:
    """Path and age of the weights: an export into the same directory is another policy."""
    newest = max((f.stat().st_mtime_ns for f in directory.glob("*.safetensors")), default=0)
    return f"{directory.resolve()} of {newest}"
