"""The range of every number of a recipe, and the check that a field holds what it is declared to.

Tables and two functions over any dataclass of dataclasses: nothing here knows `Config`.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import operator
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable


@runtime_checkable
class DataclassLike(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


# Dotted fields by what they must be; every float must be finite besides.
_AT_LEAST: dict[int, tuple[str, ...]] = {
    0: (
        "seed", "lora.rank",
        "data.num_train", "data.num_eval", "data.num_validation", "data.min_pixels",
        "data.max_pixels", "data.num_workers", "data.cache_mb", "data.select_seed",
        "rollout.top_k", "rollout.max_cache_mb",
        "algo.verl_micro_batch", "algo.kl_coef", "algo.importance_cap", "algo.generation_prompts",
        "algo.overlong_buffer_tokens",
        "optim.warmup_steps", "optim.weight_decay",
        "train.num_steps", "train.micro_batch_tokens", "train.table_every", "train.keep_best",
        "train.eval_every", "train.mismatch_gate",
        "eval.temperature", "eval.policy_samples", "eval.best_of", "eval.best_of_temperature",
    ),
    1: (
        "data.max_prompt_tokens", "data.num_threads", "data.prefetch_batches",
        "rollout.group_size", "rollout.max_completion_tokens", "rollout.chunk_tokens",
        "algo.max_generation_batches", "algo.verl_ranks",
        "optim.max_skipped_updates",
        "train.prompts_per_step", "train.prompts_per_update", "train.prompts_per_micro_batch",
        "train.save_every", "train.keep_checkpoints", "train.logprob_chunk_tokens",
        "eval.samples", "eval.max_completion_tokens", "eval.prompts_per_batch",
        "eval.bootstrap_samples",
    ),
}  # fmt: skip
_ABOVE_ZERO = (
    "algo.bar_support", "algo.clip_eps_low", "algo.clip_eps_high",
    "optim.learning_rate", "optim.max_grad_norm",
    "rollout.temperature", "rollout.repetition_penalty",
)  # fmt: skip
_SHARES = (
    "algo.label_noise", "algo.failed_quorum_frac", "algo.failed_budget_frac",
    "data.bad_image_budget_frac",
)  # fmt: skip
_REMEDIES = {
    "train.num_steps": "set it above 0, or to 0 to score the base only",
    "rollout.temperature": "training samples; set it above 0",
    "rollout.max_cache_mb": "set MiB, or 0 for no limit",
}
_OTHERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("algo.clip_dual", lambda x: x == 0 or x > 1, "set it above 1, or 0 for no dual clip"),
    ("train.async_steps", lambda x: x in (0, 1), "set 0 or 1"),
    ("rollout.top_p", lambda x: 0 < x <= 1, "set it above 0 and at most 1, which is off"),
    ("rollout.min_p", lambda x: 0 <= x < 1, "set it between 0, which is off, and 1"),
    ("eval.top_p", lambda x: 0 < x <= 1, "set it above 0 and at most 1, which is off"),
    ("eval.best_of_top_p", lambda x: 0 < x <= 1, "set it above 0 and at most 1, which is off"),
    ("optim.beta1", lambda x: 0 <= x < 1, "set it at least 0 and below 1"),
    ("optim.beta2", lambda x: 0 <= x < 1, "set it at least 0 and below 1"),
    ("lora.alpha", lambda x: x != 0, "the adapter would be scaled by 0; set it above 0"),
    ("seed", lambda x: x < 2**31, "set it below 2^31"),
)


def check_choices(
    config: DataclassLike, choices: Mapping[str, Sequence[str]], own_code: Sequence[str]
) -> None:
    """Each field of `choices` has one of its values; those of `own_code` may be a dotted path.

    Raises:
        ValueError: names the field, its value and the choices.
    """
    for path, allowed in choices.items():
        value = operator.attrgetter(path)(config)
        if value not in allowed and not (path in own_code and "." in value):
            guess = did_you_mean(value, allowed)
            raise ValueError(f"{path}={value!r}: expected one of {', '.join(allowed)}{guess}")


def check_sources(source: str, eval_sources: Iterable[str]) -> None:
    """Refuses a CoOp split beside another division of the same pictures: some would be in both.

    Args:
        source: what is trained on, perhaps a mixture.
        eval_sources: what is scored.

    Raises:
        ValueError: names both.
    """
    parts = [part.rpartition("*")[2].strip() for part in re.split(r"\s\+\s", source)]
    for part, name in itertools.product(parts, eval_sources):
        is_same = part.partition(":")[0] == name.partition(":")[0]
        if is_same and part != name and "coop=" in part + name:
            raise ValueError(
                f"data.source={part} and {name} in data.eval_sources divide the same pictures "
                "differently, so some would be in both; name the source alike in both"
            )


def check_ranges(config: DataclassLike) -> None:
    """Every number of a recipe against its own range.

    Raises:
        ValueError: names the field, its value, and what to set.
    """
    for path, is_within, remedy in _rules():
        value = operator.attrgetter(path)(config)
        if not is_within(value):
            raise ValueError(f"{path}={value}: {_REMEDIES.get(path, remedy)}")
    for path in ("data.prompt_buckets", "data.window_buckets"):
        sizes = operator.attrgetter(path)(config)
        if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"{path}={sizes}: set sizes of at least 1, each larger than the last")
    try:
        re.compile(operator.attrgetter("lora.targets")(config))
    except re.error as error:
        raise ValueError(f"lora.targets: not a regular expression ({error})") from error


def _rules() -> Iterator[tuple[str, Callable[[float], bool], str]]:
    for least, paths in _AT_LEAST.items():
        for path in paths:
            yield path, functools.partial(operator.le, least), f"set it to at least {least}"
    for path in _ABOVE_ZERO:
        yield path, lambda x: x > 0, "set a number > 0"
    for path in _SHARES:
        yield path, lambda x: 0 <= x <= 1, "set it between 0 and 1"
    yield from _OTHERS


def check_fields(config: DataclassLike, prefix: str = "") -> None:
    """Refuses attributes that are no fields, and values of another type than declared.

    A recipe is Python: ``config.train.num_step = 9`` makes an attribute that nobody reads, and
    ``config.judge.endpoints = "http://..."`` a tuple of letters.

    Raises:
        ValueError: one line with the name and what was perhaps meant, or the type.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in vars(config):
        if name not in fields:
            raise ValueError(f"{prefix}{name}: no such field{did_you_mean(name, fields, prefix)}")
    for name, field in fields.items():
        value, kind = getattr(config, name), field.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ValueError(f"{prefix}{name}={value!r}: expected a {kind.__name__}")
            check_fields(value, f"{prefix}{name}.")
        elif not _is_of(value, kind):
            wanted = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
            raise ValueError(
                f"{prefix}{name}={value!r}: expected {wanted}, got {type(value).__name__}"
            )
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name}={value}: expected a finite number")


def _is_of(value: object, kind: object) -> bool:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_is_of(part, item) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def check_name(config: DataclassLike, path: str) -> None:
    """Refuses a dotted field that a recipe does not have.

    Args:
        config: a recipe, of which only the fields count.
        path: as on the command line, without ``--config.``: ``train.num_steps``.

    Raises:
        ValueError: names the part that is not there and what was perhaps meant.
    """
    place: Any = config
    parts = path.split(".")
    for number, part in enumerate(parts):
        fields = {field.name: field.type for field in dataclasses.fields(place)}
        if part not in fields:
            before = ".".join(parts[:number])
            rest = ".".join(["", *parts[number + 1 :]])
            guess = did_you_mean(part, fields, f"{before}." if before else "", rest)
            raise ValueError(f"--config.{path}: no such field{guess}")
        kind = fields[part]
        is_last = number == len(parts) - 1
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if is_last:
                known = ", ".join(field.name for field in dataclasses.fields(kind))
                raise ValueError(f"--config.{path}: is a section; set one of its fields: {known}")
            place = kind
        elif not is_last:
            raise ValueError(f"--config.{path}: no such field; {'.'.join(parts[: number + 1])} is")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    """``; did you mean X?`` with the most similar known names, "" without any."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    words = [f"{prefix}{word}{suffix}" for word in close]
    return f"; did you mean {' or '.join(words)}?" if words else ""
