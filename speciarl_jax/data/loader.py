"""Batches of prompts in an exact, resumable order, built off the critical path by Grain.

One number says where a run is: the position in the global order of prompts. Epoch e visits
permutation(seed, e) of the usable examples; batches are cut from that order and hosts take slices
of batches (of each of its mini-batches, so that these hold the same prompts whatever the number of
hosts), so neither the number of worker threads or processes nor the number of hosts changes
which prompt comes when. Grain supplies read-ahead, threads and worker processes; its own iterator
state is not saved, because it depends on the number of workers. Instead a pipeline is started at
the saved position.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import TypedDict

import grain
import numpy as np
from absl import flags
from grain import experimental as grain_experimental

from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.collate import collate, prompt_bucket, window_bucket
from speciarl_jax.data.index import PixelCache, PromptIndex, Source, build_index
from speciarl_jax.data.prompts import EncodedPrompt, PromptBuilder
from speciarl_jax.types import JsonObject

STATE_FORMAT = 1
_ENDLESS_EPOCHS = 1_000_000


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Order of an epoch, [length] int64; the same for ever.

    Sorts raw Philox words: NumPy promises that bit streams never change, and does not promise that
    for `Generator.permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(length)
    return np.argsort(words, kind="stable")


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """Arithmetic of the global order: position -> (epoch, which usable example).

    Attributes:
        num_prompts: usable examples.
        batch_size: prompts in a batch over all hosts.
        seed, is_shuffled: order within an epoch; source order if not shuffled.
        drop_last: True drops an epoch's incomplete last batch, False pads it.
    """

    num_prompts: int
    batch_size: int
    seed: int
    is_shuffled: bool
    drop_last: bool

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches, or rounded up if the last one is padded."""
        spare = 0 if self.drop_last else self.batch_size - 1
        return (self.num_prompts + spare) // self.batch_size

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, rank within the epoch); ranks of `num_prompts` and more are padding."""
        return divmod(position, self.batches_per_epoch * self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """[num_prompts] int64: rank -> row of the prompt index."""
        if not self.is_shuffled:
            return np.arange(self.num_prompts)
        return permutation(self.seed, epoch, self.num_prompts)


class _Positions:
    """Global positions of one host's rows, from a batch on: a Grain source."""

    def __init__(self, plan: EpochPlan, num_batches: int, first: int, rows: np.ndarray):
        self._plan = plan
        self._num_batches = num_batches
        self._first = first
        self._rows = rows

    def __len__(self) -> int:
        return (self._num_batches - self._first) * len(self._rows)

    def __getitem__(self, index: int) -> int:
        batch, row = divmod(index, len(self._rows))
        return (self._first + batch) * self._plan.batch_size + int(self._rows[row])


def host_rows(
    batch_size: int, process_index: int, process_count: int, num_blocks: int
) -> np.ndarray:
    """Rows of a batch that one host reads: an equal slice of each block.

    Args:
        batch_size: prompts per batch over all hosts.
        process_index: number of this host.
        process_count: number of hosts.
        num_blocks: blocks of a batch (mini-batches).

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if process_count < 1 or num_blocks < 1 or batch_size % (process_count * num_blocks):
        raise ValueError(
            f"batch of {batch_size} prompts in {num_blocks} mini-batches over {process_count} "
            "hosts: expected a positive multiple; change train.prompts_per_step"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: expected 0 to {process_count - 1}")
    blocks = np.arange(batch_size).reshape(num_blocks, process_count, -1)
    return blocks[:, process_index].reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Item:
    position: int
    prompt: EncodedPrompt | None  # None: padding


class _Encode:
    """Position -> encoded prompt; runs in Grain's threads or worker processes."""

    def __init__(
        self,
        source: Source,
        builder: PromptBuilder,
        kept: np.ndarray,
        plan: EpochPlan,
        cache: PixelCache,
    ):
        self._source, self._builder, self._kept = source, builder, kept
        self._plan, self._cache = plan, cache
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __call__(self, position: int) -> _Item:
        epoch, rank = self._plan.locate(position)
        if rank >= self._plan.num_prompts:
            return _Item(position, None)
        known_epoch, order = self._order
        if known_epoch != epoch:
            order = self._plan.order(epoch)
            self._order = (epoch, order)
        index = int(self._kept[order[rank]])
        example = self._source[index]
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = self._builder.read_pixels(example.image)
            self._cache.put(index, pixels)
        return _Item(position, self._builder.encode(example, pixels, epoch))


class LoaderOptions(TypedDict, total=False):
    """The keyword arguments of `PromptLoader`, which says what they mean."""

    seed: int
    shuffle: bool
    drop_last: bool | None
    num_epochs: int | None
    max_prompt_tokens: int
    bad_image_budget_frac: float
    pad_id: int
    num_workers: int
    num_threads: int
    prefetch_batches: int
    process_index: int
    process_count: int
    num_blocks: int
    prompt_buckets: Sequence[int]
    window_buckets: Sequence[int]
    cache_bytes: int
    index_dir: str | pathlib.Path | None


class PromptLoader:
    """Iterator over `PromptBatch`; `get_state` and `set_state` are exact.

    Attributes:
        index: what is used and what was left out, with reasons.
        plan: the global order.
        num_batches: batches until the iterator ends.
        wait_s: seconds that callers have spent inside `__next__`.
    """

    def __init__(
        self,
        source: Source,
        builder: PromptBuilder,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool | None = None,
        num_epochs: int | None = None,
        max_prompt_tokens: int = 2048,
        bad_image_budget_frac: float = 0.05,
        pad_id: int = 0,
        num_workers: int = 0,
        num_threads: int = 2,
        prefetch_batches: int = 2,
        process_index: int = 0,
        process_count: int = 1,
        num_blocks: int = 1,
        prompt_buckets: Sequence[int] = (),
        window_buckets: Sequence[int] = (),
        cache_bytes: int = 256 * 2**20,
        index_dir: str | pathlib.Path | None = None,
    ) -> None:
        """Scans the source (see `build_index`) and stands at position 0.

        Args:
            source: examples with random access.
            builder: encodes them.
            batch_size: prompts per batch over all hosts; each host gets batch_size / process_count.
            seed: of the order, with `shuffle`.
            shuffle: a new permutation each epoch; False keeps the source's order.
            drop_last: drop an epoch's incomplete batch (True), or pad it (False); None does as
                `shuffle` says.
            num_epochs: epochs until the iterator ends; None for no end.
            max_prompt_tokens: see `build_index`.
            bad_image_budget_frac: see `build_index`.
            pad_id: token past the end of a prompt.
            num_workers: Grain worker processes; 0 decodes in threads of this process, which is
                enough for a few hundred images a second, for Pillow releases the interpreter lock.
            num_threads: threads per process.
            prefetch_batches: finished batches held ready.
            process_index: number of this host.
            process_count: number of hosts.
            num_blocks: see `host_rows`.
            prompt_buckets: see `collate`.
            window_buckets: see `collate`.
            cache_bytes: resized images kept between epochs (only with num_workers=0); 0 for none.
            index_dir: see `build_index`.

        Raises:
            ValueError: see `build_index`; or sizes that do not fit each other.
        """
        self._cache = PixelCache(0 if num_workers else cache_bytes)
        self.index: PromptIndex = build_index(
            source,
            builder,
            max_prompt_tokens,
            bad_image_budget_frac,
            self._cache,
            index_dir,
            num_threads,
        )
        is_dropping = shuffle if drop_last is None else drop_last
        self.plan = EpochPlan(len(self.index.kept), batch_size, seed, shuffle, is_dropping)
        _check_sizes(self.plan)
        self._rows = host_rows(batch_size, process_index, process_count, num_blocks)
        self.num_batches = self.plan.batches_per_epoch * (num_epochs or _ENDLESS_EPOCHS)
        self.wait_s = 0.0
        self._encode = _Encode(source, builder, self.index.kept, self.plan, self._cache)
        self._builder, self._pad_id = builder, pad_id
        self._buckets = (tuple(prompt_buckets), tuple(window_buckets))
        self._num_workers, self._num_threads = num_workers, num_threads
        self._prefetch_batches = prefetch_batches
        self._next_batch = 0
        self._pipeline: Iterator[PromptBatch] | None = None

    def __iter__(self) -> PromptLoader:
        """Itself; iteration goes on where the loader stands."""
        return self

    def __next__(self) -> PromptBatch:
        """The next batch of this host."""
        if self._next_batch >= self.num_batches:
            raise StopIteration
        start = time.perf_counter()
        if self._pipeline is None:
            self._pipeline = self._start()
        batch = next(self._pipeline)
        self._next_batch += 1
        self.wait_s += time.perf_counter() - start
        return batch

    @property
    def position(self) -> int:
        """Prompts consumed so far over all hosts and epochs, padding included."""
        return self._next_batch * self.plan.batch_size

    def get_state(self) -> JsonObject:
        """What a checkpoint needs, as JSON: the consumed position and what it refers to."""
        return {
            "format": STATE_FORMAT,
            "position": self.position,
            "batch_size": self.plan.batch_size,
            "seed": self.plan.seed,
            "is_shuffled": self.plan.is_shuffled,
            "drop_last": self.plan.drop_last,
            "data": self.index.fingerprint,
        }

    def set_state(self, state: JsonObject) -> None:
        """Moves to a saved position; workers and hosts may differ from those that saved it.

        Raises:
            ValueError: the state belongs to other data, another batch size, seed or order.
        """
        here = self.get_state()
        for field, value in here.items():
            if field != "position" and state.get(field) != value:
                raise ValueError(
                    f"saved data position has {field}={state.get(field)!r}, this run has {value!r}:"
                    " the order of prompts would change; resume with the same data and settings"
                )
        position = state["position"]
        if not isinstance(position, int) or position < 0 or position % self.plan.batch_size:
            raise ValueError(
                f"saved data position {position}: expected a multiple of {self.plan.batch_size}"
            )
        self.close()
        self._next_batch = position // self.plan.batch_size

    def close(self) -> None:
        """Stops read-ahead. The loader may be used again; it goes on at the same position."""
        closing = getattr(self._pipeline, "close", None)
        if closing is not None:
            closing()
        self._pipeline = None

    def shapes(self, num_batches: int | None = None) -> list[tuple[int, int]]:
        """(padded prompt tokens S, windows per image) of the coming batches, without repeats.

        Exact, from the lengths in the index: these are the shapes to compile before the first step.
        On several hosts each host has its own.

        Args:
            num_batches: how far to look ahead; None for one epoch.
        """
        last = self._next_batch + (num_batches or self.plan.batches_per_epoch)
        found: set[tuple[int, int]] = set()
        for number in range(self._next_batch, min(last, self.num_batches)):
            rows = self._rows_of(number)
            tokens = int(self.index.num_tokens[rows].max(initial=1))
            windows = int(self.index.num_windows[rows].max(initial=1))
            found.add(
                (prompt_bucket(tokens, self._buckets[0]), window_bucket(windows, self._buckets[1]))
            )
        return sorted(found)

    def _rows_of(self, batch: int) -> np.ndarray:
        epoch, first = self.plan.locate(batch * self.plan.batch_size)
        ranks = first + self._rows
        order = self.plan.order(epoch)
        return np.asarray(order[ranks[ranks < self.plan.num_prompts]])

    def _collate(self, items: Sequence[_Item]) -> PromptBatch:
        return collate(
            [item.prompt for item in items if item.prompt is not None],
            self._builder.arch,
            self._builder.limits,
            self._pad_id,
            num_prompts=len(items),
            prompt_buckets=self._buckets[0],
            window_buckets=self._buckets[1],
            global_index=[item.position for item in items],
        )

    def _start(self) -> Iterator[PromptBatch]:
        rows = len(self._rows)
        positions = _Positions(self.plan, self.num_batches, self._next_batch, self._rows)
        pipeline = (
            grain.MapDataset.source(positions)
            .map(self._encode)
            .to_iter_dataset(
                grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=max(rows, 16))
            )
        )
        if self._num_workers:
            _mark_flags_parsed()
            pipeline = pipeline.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._num_workers)
            )
        batches = pipeline.batch(rows, drop_remainder=True, batch_fn=self._collate)
        return iter(
            grain_experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=self._prefetch_batches
            )
        )


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which a program without absl.app never parses."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check_sizes(plan: EpochPlan) -> None:
    if plan.batch_size < 1:
        raise ValueError(
            f"batch of {plan.batch_size} prompts: expected a positive number; set "
            "train.prompts_per_step"
        )
    if plan.batches_per_epoch < 1:
        raise ValueError(
            f"batch of {plan.batch_size} prompts, but the data has only {plan.num_prompts} usable "
            "ones and incomplete batches are dropped; lower train.prompts_per_step or add data"
        )
