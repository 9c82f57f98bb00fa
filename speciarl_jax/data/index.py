"""Which examples of a source can be prompts: decided once, before the first step.

Every image is decoded and every prompt measured, so that nothing can fail, or change the order of
prompts, in the middle of a run. The result can be kept on disk; the resized pixels are kept in
memory within a budget, so that the first epoch does not do the work again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import pathlib
import threading
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.decode import BadImageError
from speciarl_jax.data.prompts import PromptBuilder
from speciarl_jax.files import read_json, write_whole
from speciarl_jax.types import Example

_NAMES_IN_ERROR = 10
_PROGRESS_EVERY = 5000
_LOG = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """Random access to examples. May have ``fingerprint() -> str``, its identity on disk."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Example:
        """The index-th example, 0 <= index < len."""


class PixelCache:
    """Resized images by index, first come first kept, within a byte budget. Safe for threads.

    Nothing is evicted: under a fresh permutation each epoch, any fixed subset hits as often as the
    best eviction policy would, and costs nothing. A copy sent to another process is empty and
    stays so.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Starts empty; a budget of 0 keeps nothing."""
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> np.ndarray | None:
        """Kept pixels, [h, w, 3] uint8, or None."""
        return self._kept.get(index)

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keeps `pixels` if they fit."""
        with self._lock:
            fits = self.used_bytes + pixels.nbytes <= self.budget_bytes
            if fits and index not in self._kept:
                self._kept[index] = pixels
                self.used_bytes += pixels.nbytes

    def __reduce__(self) -> tuple[type[PixelCache], tuple[int]]:
        """Pickles as an empty cache without a budget."""
        return PixelCache, (0,)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An example that is left out, and why."""

    prompt_id: str
    image_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class PromptIndex:
    """The usable examples of a source, in source order.

    Attributes:
        kept: [K] int64 indices into the source.
        num_tokens: [K] int32 prompt lengths (the longest over a prompt pool).
        num_windows: [K] int32 vision windows.
        bad: unreadable images.
        over_long: prompts above the token limit.
        fingerprint: hash of the kept prompt ids; a saved position is valid only with the same one.
    """

    kept: np.ndarray
    num_tokens: np.ndarray
    num_windows: np.ndarray
    bad: tuple[Skipped, ...]
    over_long: tuple[Skipped, ...]
    fingerprint: str

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """All examples that were left out."""
        return self.bad + self.over_long


@dataclasses.dataclass(frozen=True)
class _Row:
    prompt_id: str
    image_name: str
    tokens: int
    windows: int
    error: str


def build_index(
    source: Source,
    builder: PromptBuilder,
    data: DataConfig,
    cache: PixelCache,
    index_dir: pathlib.Path,
) -> PromptIndex:
    """Reads every example once and lists those that can be prompts.

    Args:
        source: the examples.
        builder: measures prompts; its limits decide the image tokens.
        data: the token limit, the budget of unreadable images and the number of threads.
        cache: receives resized images.
        index_dir: where the result is kept for the next run, if the source has a
            ``fingerprint()``.

    Raises:
        ValueError: an empty source, a prompt id that occurs twice, more unreadable images than the
            budget allows (with names), or no prompt short enough.
    """
    if not len(source):
        raise ValueError("the data source is empty: choose another split or selection")
    file = _index_file(source, builder, index_dir)
    rows = _load_rows(file, len(source))
    if rows is None:
        rows = _measure(source, builder, cache, data.num_threads)
        _save_rows(file, rows)
    _check_unique(row.prompt_id for row in rows)
    bad = [Skipped(r.prompt_id, r.image_name, r.error) for r in rows if r.error]
    _check_budget(bad, len(rows), data.bad_image_budget_frac)
    limit = data.max_prompt_tokens
    readable = [i for i, row in enumerate(rows) if not row.error]
    kept = [i for i in readable if rows[i].tokens <= limit]
    if not kept:
        shortest = min(rows[i].tokens for i in readable)
        raise ValueError(
            f"no prompt fits into data.max_prompt_tokens={limit}: the shortest has {shortest} "
            "tokens, image included; raise data.max_prompt_tokens or lower data.max_pixels"
        )
    over_long = [
        Skipped(row.prompt_id, row.image_name, f"{row.tokens} prompt tokens > {limit}")
        for row in rows
        if row.tokens > limit
    ]
    digest = hashlib.sha256("\n".join(rows[i].prompt_id for i in kept).encode())
    return PromptIndex(
        kept=np.asarray(kept, np.int64),
        num_tokens=np.asarray([rows[i].tokens for i in kept], np.int32),
        num_windows=np.asarray([rows[i].windows for i in kept], np.int32),
        bad=tuple(bad),
        over_long=tuple(over_long),
        fingerprint=digest.hexdigest()[:16],
    )


def _measure(
    source: Source, builder: PromptBuilder, cache: PixelCache, num_threads: int
) -> list[_Row]:
    def measure(index: int) -> _Row:
        example = source[index]
        try:
            pixels = builder.read_pixels(example.image)
        except BadImageError as error:
            return _Row(example.prompt_id, example.image_name, 0, 0, str(error))
        cache.put(index, pixels)
        return _Row(example.prompt_id, example.image_name, *builder.size_of(pixels), "")

    with concurrent.futures.ThreadPoolExecutor(max(num_threads, 1)) as pool:
        rows: list[_Row] = []
        for row in pool.map(measure, range(len(source))):
            rows.append(row)
            if len(rows) % _PROGRESS_EVERY == 0:
                _LOG.info("looked at %d of %d images", len(rows), len(source))
        return rows


def _check_unique(prompt_ids: Iterable[str]) -> None:
    (prompt_id, times), *_ = collections.Counter(prompt_ids).most_common(1)
    if times > 1:
        raise ValueError(
            f"prompt id {prompt_id!r} occurs twice in the data: a group would mix two prompts; "
            "rename one of the images, or do not list a source twice"
        )


def _check_budget(bad: list[Skipped], total: int, budget_frac: float) -> None:
    if len(bad) <= budget_frac * total:
        if bad:
            _LOG.warning("%d of %d images cannot be read and are skipped", len(bad), total)
        return
    names = "; ".join(f"{s.image_name or s.prompt_id}: {s.reason}" for s in bad[:_NAMES_IN_ERROR])
    more = f"; and {len(bad) - _NAMES_IN_ERROR} more" if len(bad) > _NAMES_IN_ERROR else ""
    raise ValueError(
        f"{len(bad)} of {total} images cannot be read, more than data.bad_image_budget_frac="
        f"{budget_frac} allows ({names}{more}); repair or remove them, or raise the budget"
    )


def _index_file(
    source: Source, builder: PromptBuilder, index_dir: pathlib.Path
) -> pathlib.Path | None:
    identity = getattr(source, "fingerprint", None)
    if identity is None:
        return None
    key = hashlib.sha256(f"{identity()}/{builder.fingerprint()}".encode()).hexdigest()[:24]
    return index_dir / f"index-{key}.json"


def _load_rows(file: pathlib.Path | None, expected: int) -> list[_Row] | None:
    """Rows of an earlier run; None if there are none or the file is damaged."""
    if file is None or not file.is_file():
        return None
    try:
        content = read_json(file, "it is made again", list)
        rows = [_Row(*row) for row in content]
    except (ValueError, TypeError):
        return None
    return rows if len(rows) == expected else None


def _save_rows(file: pathlib.Path | None, rows: list[_Row]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps([dataclasses.astuple(row) for row in rows]))
    except OSError as error:
        _LOG.warning("the prompt index cannot be kept for the next run: %s", error)
