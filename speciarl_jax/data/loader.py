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
import functools
import time
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags
from grain import experimental as grain_experimental

from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.collate import collate, prompt_bucket, window_bucket
from speciarl_jax.data.index import PixelCache, PromptIndex, Source, build_index
from speciarl_jax.data.prompts import EncodedPrompt, PromptBuilder
from speciarl_jax.data.sources.catalog import resolve_data_dir
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


@functools.lru_cache(maxsize=4)
def _order(plan: EpochPlan, epoch: int) -> np.ndarray:
    """[num_prompts] int64, read-only: rank -> row of the prompt index."""
    count = plan.num_prompts
    order = permutation(plan.seed, epoch, count) if plan.is_shuffled else np.arange(count)
    order.setflags(write=False)
    return order


def host_rows(
    batch_size: int, process_index: int, process_count: int, num_blocks: int
) -> np.ndarray:
    """Rows of a batch that one host reads: an equal slice of each block (mini-batch).

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


@dataclasses.dataclass(frozen=True)
class _Encode:
    """Number of one of this host's rows -> encoded prompt; runs in Grain's threads or processes."""

    source: Source
    builder: PromptBuilder
    kept: np.ndarray
    plan: EpochPlan
    rows: np.ndarray
    cache: PixelCache

    def __call__(self, number: int) -> _Item:
        batch, row = divmod(number, len(self.rows))
        position = batch * self.plan.batch_size + int(self.rows[row])
        epoch, rank = self.plan.locate(position)
        if rank >= self.plan.num_prompts:
            return _Item(position, None)
        index = int(self.kept[_order(self.plan, epoch)[rank]])
        example = self.source[index]
        pixels = self.cache.get(index)
        if pixels is None:
            pixels = self.builder.read_pixels(example.image)
            self.cache.put(index, pixels)
        return _Item(position, self.builder.encode(example, pixels, epoch))


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
        data: DataConfig,
        source: Source,
        builder: PromptBuilder,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool | None = None,
        num_epochs: int | None = None,
        pad_id: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        num_blocks: int = 1,
    ) -> None:
        """Scans the source (see `build_index`) and stands at position 0.

        Args:
            data: limits, buckets, workers and cache; not the source. Threads of this process
                (num_workers=0) decode a few hundred images a second, for Pillow releases the
                interpreter lock.
            source: the examples.
            builder: encodes them.
            batch_size: prompts per batch over all hosts; each host gets batch_size / process_count.
            seed: of the order, with `shuffle`.
            shuffle: a new permutation each epoch; False keeps the source's order.
            drop_last: drop an epoch's incomplete batch (True), or pad it (False); None does as
                `shuffle` says.
            num_epochs: epochs until the iterator ends; None for no end.
            pad_id: token past the end of a prompt.
            process_index: of this host; with `process_count` and `num_blocks` see `host_rows`.

        Raises:
            ValueError: see `build_index`; or sizes that do not fit each other.
        """
        cache = PixelCache(0 if data.num_workers else data.cache_mb * 2**20)
        index_dir = resolve_data_dir(data.data_dir) / "index"
        self.index: PromptIndex = build_index(source, builder, data, cache, index_dir)
        is_dropping = shuffle if drop_last is None else drop_last
        self.plan = EpochPlan(len(self.index.kept), batch_size, seed, shuffle, is_dropping)
        _check_sizes(self.plan)
        self._rows = host_rows(batch_size, process_index, process_count, num_blocks)
        self.num_batches = self.plan.batches_per_epoch * (num_epochs or _ENDLESS_EPOCHS)
        self.wait_s = 0.0
        self._encode = _Encode(source, builder, self.index.kept, self.plan, self._rows, cache)
        self._data, self._builder, self._pad_id = data, builder, pad_id
        self._next_batch = 0
        self._pipeline: grain.DatasetIterator[PromptBatch] | None = None

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
        batch: PromptBatch = next(self._pipeline)
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
        if self._pipeline is not None:
            self._pipeline.close()
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
            length = prompt_bucket(tokens, self._data.prompt_buckets)
            found.add((length, window_bucket(windows, self._data.window_buckets)))
        return sorted(found)

    def _rows_of(self, batch: int) -> np.ndarray:
        epoch, first = self.plan.locate(batch * self.plan.batch_size)
        ranks = first + self._rows
        return np.asarray(_order(self.plan, epoch)[ranks[ranks < self.plan.num_prompts]])

    def _collate(self, items: Sequence[_Item]) -> PromptBatch:
        return collate(
            [item.prompt for item in items if item.prompt is not None],
            self._builder.arch,
            self._builder.limits,
            self._pad_id,
            num_prompts=len(items),
            prompt_buckets=self._data.prompt_buckets,
            window_buckets=self._data.window_buckets,
            global_index=[item.position for item in items],
        )

    def _start(self) -> grain.DatasetIterator[PromptBatch]:
        rows = len(self._rows)
        threads = grain.ReadOptions(self._data.num_threads, prefetch_buffer_size=max(rows, 16))
        numbers = grain.MapDataset.range(self._next_batch * rows, self.num_batches * rows)
        pipeline = numbers.map(self._encode).to_iter_dataset(threads)
        if self._data.num_workers:
            _mark_flags_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._data.num_workers)
            pipeline = pipeline.mp_prefetch(workers)
        batches = pipeline.batch(rows, drop_remainder=True, batch_fn=self._collate)
        return iter(
            grain_experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=self._data.prefetch_batches
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
