"""The host side of a rollout: lays rows out, looks up between chunks, hands finished answers out.

One batch goes encode -> prefill -> fork -> decode in chunks. After each chunk the engine takes out
the rows that have stopped and, if enough have, compacts the rest into a smaller batch. What a row
samples depends only on (seed, step, prompt, sample), not on its neighbours or the batch split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from speciarl_jax.config import RolloutConfig
from speciarl_jax.rollout import decode
from speciarl_jax.rollout.sampling import Sampling, row_keys
from speciarl_jax.types import PromptBatch

_BUCKET_RATIO = 0.75


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What sampling must know of the tokenizer.

    Attributes:
        stop_ids: [stops] int32 ids that end a completion.
        banned: [V] True for ids that must never be sampled: vision tokens and ids that the
            tokenizer does not have (the embedding table is padded beyond it).
        decode: token ids to text, special tokens left out.
    """

    stop_ids: np.ndarray
    banned: np.ndarray
    decode: Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """One sampled answer: prompt and sample index, tokens and log-probs [C], how it ended."""

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    is_truncated: bool


@dataclasses.dataclass
class RolloutStats:
    """Work done and wasted by one `generate`, in slot-steps (one row decoded for one token)."""

    slot_steps: int = 0
    live_steps: int = 0
    decode_steps: int = 0

    @property
    def slot_utilization(self) -> float:
        """Share of decoded slot-steps that produced a token of an answer."""
        return self.live_steps / self.slot_steps if self.slot_steps else 1.0


@functools.partial(jax.jit, static_argnames="graphdef")
def _prefill(graphdef: nnx.GraphDef, states: tuple, *arrays: Array) -> decode.PromptCache:
    return decode.prefill(decode.merge_text(graphdef, *states), *arrays)


@functools.partial(jax.jit, static_argnames="num_columns")
def _start(
    cache: decode.PromptCache, rows: decode.RowMap, is_padding: Array, num_columns: int
) -> decode.DecodeState:
    return decode.start_decoding(cache, rows, is_padding, num_columns)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("state",))
def _decode(
    graphdef: nnx.GraphDef,
    states: tuple,
    cache: decode.PromptCache,
    rows: decode.RowMap,
    state: decode.DecodeState,
    stop_ids: Array,
    banned: Array,
    until: Array,
    sampling: Sampling,
) -> decode.DecodeState:
    text = decode.merge_text(graphdef, *states)
    return decode.decode_chunk(text, cache, rows, state, stop_ids, banned, until, sampling)


@functools.partial(jax.jit, static_argnames="num_columns")
def _compact(state: decode.DecodeState, keep: Array, num_columns: int) -> decode.DecodeState:
    return decode.compact(state, keep, num_columns)


@functools.partial(jax.jit, static_argnames="seed")
def _row_keys(seed: int, step: Array, prompt: Array, sample: Array) -> Array:
    return row_keys(seed, step, prompt, sample)


def bucket_size(count: int, full: int) -> int:
    """Smallest of full, .75 full, .75^2 full, ... (rounded up) that holds `count` rows."""
    size = full
    while True:
        smaller = int(np.ceil(size * _BUCKET_RATIO))
        if smaller >= size or smaller < count:
            return size
        size = smaller


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Host view of the rows on the device: (prompt, sample) per row, -1 for padding rows."""

    prompt: np.ndarray
    sample: np.ndarray

    def row_map(self, num_prompts: int, slots: int, keys: Array) -> decode.RowMap:
        """Index maps between rows and the [P, slots] grid; padding rows share slot 0."""
        slot_rows = np.zeros((num_prompts, slots), np.int32)
        row_slot = np.zeros(len(self.prompt), np.int32)
        used = np.zeros(num_prompts, np.int32)
        for row, prompt in enumerate(self.prompt):
            if prompt >= 0:
                slot_rows[prompt, used[prompt]] = row
                row_slot[row] = prompt * slots + used[prompt]
                used[prompt] += 1
        return decode.RowMap(np.maximum(self.prompt, 0), row_slot, slot_rows, keys)


class RolloutEngine:
    """Samples groups of answers. Holds no parameters; they come with each call."""

    def __init__(
        self, graphdef: nnx.GraphDef, config: RolloutConfig, vocabulary: Vocabulary
    ) -> None:
        """Keeps the static parts.

        Args:
            graphdef: the policy's structure, adapter included.
            config: chunking, stop strings, length limit.
            vocabulary: stop ids, banned ids, detokenizer.
        """
        self.graphdef = graphdef
        self.config = config
        self.vocabulary = vocabulary
        self.stats = RolloutStats()

    def generate(
        self,
        states: tuple[nnx.State, ...],
        batch: PromptBatch,
        image_embeds: Array,
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> Iterator[list[FinishedRow]]:
        """Yields answers as they finish, in lists, each (prompt, sample) of real prompts once.

        Args:
            states: the parts that `graphdef` merges with (trainable, frozen).
            batch: prompts; padding prompts get no rows.
            image_embeds: [I*M, D] from `policy.vision.encode_images`.
            group_size: answers per prompt.
            sampling: how tokens are chosen.
            seed: run seed.
            step: training step, folded into the randomness.
        """
        self.stats = RolloutStats()
        cache = _prefill(
            self.graphdef,
            states,
            batch.tokens,
            batch.positions,
            batch.prompt_lengths,
            batch.position_deltas,
            batch.image_rows,
            image_embeds,
        )
        real = np.flatnonzero(batch.is_real)
        layout = self._first_layout(real, batch.num_prompts, group_size)
        index = batch.global_index[np.maximum(layout.prompt, 0)]
        keys = _row_keys(seed, np.int32(step), index.astype(np.int32), layout.sample)
        yield from self._decode_all(states, cache, layout, keys, group_size, sampling)

    def _first_layout(self, real: np.ndarray, num_prompts: int, group_size: int) -> _Layout:
        prompt = np.full(num_prompts * group_size, -1, np.int32)
        prompt[: len(real) * group_size] = np.repeat(real, group_size)
        sample = np.tile(np.arange(group_size, dtype=np.int32), num_prompts)
        return _Layout(prompt, sample)

    def _decode_all(
        self,
        states: tuple[nnx.State, ...],
        cache: decode.PromptCache,
        layout: _Layout,
        keys: Array,
        slots: int,
        sampling: Sampling,
    ) -> Iterator[list[FinishedRow]]:
        limit = self.config.max_completion_tokens
        num_prompts = cache.lengths.shape[0]
        full, columns = len(layout.prompt), self._columns(0)
        rows = layout.row_map(num_prompts, slots, keys)
        state = _start(cache, rows, layout.prompt < 0, columns)
        emitted = layout.prompt < 0
        step = 0
        while True:
            until = min(step + self.config.chunk_tokens, limit)
            state = _decode(
                self.graphdef,
                states,
                cache,
                rows,
                state,
                self.vocabulary.stop_ids,
                self.vocabulary.banned,
                np.int32(until),
                sampling,
            )
            previous, step = step, int(state.step)
            finished, is_done = self._finished_rows(state, layout, emitted, step >= limit)
            self._count(len(layout.prompt), step - previous, finished)
            emitted = emitted | is_done
            if finished:
                yield finished
            if emitted.all():
                return
            state = dataclasses.replace(state, is_done=jnp.asarray(emitted))
            size = bucket_size(int((~emitted).sum()), full) if self.config.compact else full
            new_columns = self._columns(step)
            if size < len(layout.prompt) or new_columns != columns:
                keep = _rows_to_keep(emitted, min(size, len(layout.prompt)))
                emitted = emitted[keep]
                layout = _Layout(np.where(emitted, -1, layout.prompt[keep]), layout.sample[keep])
                keys, columns = jnp.take(keys, keep), new_columns
                rows = layout.row_map(num_prompts, slots, keys)
                state = _compact(state, keep, columns)

    def _columns(self, step: int) -> int:
        """Columns of the own cache: doubling from one chunk, all of them without compaction."""
        limit = self.config.max_completion_tokens
        if not self.config.compact:
            return limit
        columns = self.config.chunk_tokens
        while columns < min(step + self.config.chunk_tokens, limit):
            columns *= 2
        return min(columns, limit)

    def _count(self, num_rows: int, steps: int, finished: list[FinishedRow]) -> None:
        self.stats.decode_steps += steps
        self.stats.slot_steps += num_rows * steps
        self.stats.live_steps += sum(len(row.tokens) for row in finished)

    def _finished_rows(
        self, state: decode.DecodeState, layout: _Layout, emitted: np.ndarray, is_last: bool
    ) -> tuple[list[FinishedRow], np.ndarray]:
        """Rows that are complete now and were not before, and the mask of complete rows."""
        is_stopped, lengths = (
            np.asarray(x) for x in jax.device_get((state.is_done, state.lengths))
        )
        is_done = is_stopped.copy()
        needs_text = bool(self.config.stop_strings)
        if not (needs_text or is_last or (is_done & ~emitted).any()):
            return [], is_done
        tokens, logprobs = jax.device_get((state.tokens, state.logprobs))
        finished = []
        for row in np.flatnonzero(~emitted):
            length = int(lengths[row])
            cut = self._stop_string_length(tokens[row, :length]) if needs_text else None
            is_done[row] |= cut is not None or is_last
            if is_done[row]:
                end = length if cut is None else cut
                finished.append(
                    FinishedRow(
                        prompt=int(layout.prompt[row]),
                        sample=int(layout.sample[row]),
                        tokens=tokens[row, :end].copy(),
                        logprobs=logprobs[row, :end].copy(),
                        is_truncated=cut is None and not is_stopped[row],
                    )
                )
        return finished, is_done

    def _stop_string_length(self, tokens: np.ndarray) -> int | None:
        """Number of tokens up to the one that completes a stop string, None if there is none."""
        stops = self.config.stop_strings

        def is_stopped(count: int) -> bool:
            text = self.vocabulary.decode(tokens[:count].tolist())
            return any(stop in text for stop in stops)

        if not is_stopped(len(tokens)):
            return None
        low, high = 0, len(tokens)  # text grows with the tokens, so bisection finds the first one
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_stopped(middle) else (middle, high)
        return high


def _rows_to_keep(emitted: np.ndarray, size: int) -> np.ndarray:
    """Live rows in order, then finished ones as fillers."""
    order = np.concatenate([np.flatnonzero(~emitted), np.flatnonzero(emitted)])
    return np.sort(order[:size]).astype(np.int32)
