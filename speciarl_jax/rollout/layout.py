"""The host's plan of a rollout: sizes that are compiled, waves of prompts, rows on their shards.

Sizes come from short fixed lists, so that warm-up can compile all of them:

    rows      full, .75 of it and so on six times, then halves four times: at most 11 sizes
    columns   one chunk, doubled up to the limit: 6 sizes for 64 to 2,048; a program for each pair

On GPU rows are quartered twice, columns a quarter of the limit and then all of it: 6 pairs. Moving
a quarter of the rows also needs little memory beside the caches that they come from.

Rows and columns only move to the next size of their list, which keeps the programs that move them
as few as the sizes. Eleven row sizes keep 82 % of the slots of 2,560 rows live at log-normal
lengths (median 120, 95 % below 600); unlimited .75-steps would keep 88 % with 26 sizes.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.devices.layout import AnyArray
from speciarl_jax.rollout.decode import RowMap

_QUARTERS, _HALVES = 6, 4
_FEW_STEPS = 2


def row_sizes(full: int, has_few: bool = False) -> list[int]:
    """Rows of a shard that a decode batch may have, from all of them downwards."""
    sizes = [full]
    for ratio in [0.25] * _FEW_STEPS if has_few else [0.75] * _QUARTERS + [0.5] * _HALVES:
        smaller = math.ceil(sizes[-1] * ratio)
        if smaller == sizes[-1]:
            break
        sizes.append(smaller)
    return sizes


def next_rows(size: int, full: int, has_few: bool = False) -> int:
    """The size after `size`; 0 if there is none."""
    sizes = row_sizes(full, has_few)
    place = sizes.index(size) + 1
    return sizes[place] if place < len(sizes) else 0


def column_sizes(chunk: int, limit: int, is_growing: bool, has_few: bool = False) -> list[int]:
    """Columns of the own cache: doubling from one chunk, two with `has_few`, or all at once."""
    if not is_growing:
        return [limit]
    if has_few:
        return sorted({min(max(chunk, limit // 4), limit), limit})
    sizes = [min(chunk, limit)]
    while sizes[-1] < limit:
        sizes.append(min(2 * sizes[-1], limit))
    return sizes


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """Prompts of one wave, shard by shard.

    Attributes:
        origin: [P] index in the batch, -1 for padding.
        tokens, positions, lengths, position_deltas: as in `data.batch.PromptBatch`.
        image_rows: [P, S] rows of the image table, counted from the start of the shard's block.
        global_index: [P] int32.
    """

    origin: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    position_deltas: np.ndarray
    image_rows: np.ndarray
    global_index: np.ndarray

    @property
    def num_prompts(self) -> int:
        """P of the wave."""
        return len(self.origin)

    @property
    def has_prompts(self) -> bool:
        """It is not all padding."""
        return bool((self.origin >= 0).any())


def waves(
    batch: PromptBatch, table_rows: int, num_shards: int, prompts_per_wave: int
) -> list[PromptArrays]:
    """Cuts a batch into equal waves; each takes the same number of prompts from every shard.

    Blocks of the image table lie with their prompts. `prompts_per_wave` is a multiple of the
    shards; the last wave is filled up with padding prompts, and may be nothing else.

    Raises:
        ValueError: P is not a multiple of D.
    """
    if batch.num_prompts % num_shards:
        raise ValueError(
            f"a batch of {batch.num_prompts} prompts does not divide over {num_shards} shards of "
            "the mesh (data x fsdp); pad it to a multiple"
        )
    blocks = np.arange(batch.num_prompts).reshape(num_shards, -1)
    image_rows = batch.table_rows(table_rows, num_shards)
    width = min(prompts_per_wave // num_shards, blocks.shape[1])
    found = []
    for start in range(0, blocks.shape[1], width):
        block = blocks[:, start : start + width]
        fill = ((0, 0), (0, width - block.shape[1]))
        index = np.pad(block, fill, mode="edge").reshape(-1)
        is_used = np.pad(np.ones_like(block, bool), fill).reshape(-1) & batch.is_real[index]
        found.append(_select(batch, image_rows, index, is_used))
    return found


def _select(
    batch: PromptBatch, image_rows: np.ndarray, index: np.ndarray, is_used: np.ndarray
) -> PromptArrays:
    return PromptArrays(
        origin=np.where(is_used, index, -1),
        tokens=batch.tokens[index],
        positions=batch.positions[index],
        lengths=batch.prompt_lengths[index],
        position_deltas=batch.position_deltas[index],
        image_rows=image_rows[index],
        global_index=batch.global_index[index].astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Host view of the rows on the device, [D, r]: block by block.

    Attributes:
        prompt: index within the shard's block of prompts.
        sample: which of the prompt's answers.
        is_free: no answer is decoded here: padding, or handed out already.
    """

    prompt: np.ndarray
    sample: np.ndarray
    is_free: np.ndarray

    @classmethod
    def of_prompts(cls, prompts: PromptArrays, num_shards: int, group_size: int) -> Rows:
        """`group_size` rows for each real prompt, then padding, in every block."""
        is_real = (prompts.origin >= 0).reshape(num_shards, -1)
        per_shard = is_real.shape[1]
        prompt = np.zeros((num_shards, per_shard * group_size), np.int32)
        is_free = np.ones_like(prompt, bool)
        for shard in range(num_shards):
            rows = np.repeat(np.flatnonzero(is_real[shard]), group_size)
            prompt[shard, : len(rows)] = rows
            is_free[shard, : len(rows)] = False
        sample = np.tile(np.arange(group_size, dtype=np.int32), (num_shards, per_shard))
        return cls(prompt, sample, is_free)

    @property
    def per_shard(self) -> int:
        """Rows of a shard."""
        return int(self.prompt.shape[1])

    def flat_prompt(self, num_prompts: int) -> np.ndarray:
        """[R] index of each row's prompt in the wave."""
        first = np.arange(len(self.prompt)) * (num_prompts // len(self.prompt))
        return (self.prompt + first[:, None]).reshape(-1)

    def most_live(self) -> int:
        """Unfinished rows of the fullest shard."""
        return int((~self.is_free).sum(axis=1).max())

    def row_map(self, num_prompts: int, slots: int) -> RowMap[AnyArray]:
        """Index maps between rows and each shard's grid; free rows share slot 0."""
        num_shards, per_shard = self.prompt.shape
        slot_rows = np.zeros((num_shards, num_prompts // num_shards, slots), np.int32)
        row_slot = np.zeros((num_shards, per_shard), np.int32)
        used = np.zeros(slot_rows.shape[:2], np.int32)
        for shard, row in zip(*np.nonzero(~self.is_free), strict=True):
            prompt = self.prompt[shard, row]
            slot_rows[shard, prompt, used[shard, prompt]] = row
            row_slot[shard, row] = prompt * slots + used[shard, prompt]
            used[shard, prompt] += 1
        return RowMap(self.prompt.reshape(-1), row_slot.reshape(-1), slot_rows.reshape(-1, slots))

    def shrunk(self, size: int) -> tuple[Rows, np.ndarray]:
        """The live rows of each shard, in order, and fillers; with the indices kept, [D * size]."""
        order = np.argsort(self.is_free, axis=1, kind="stable")
        keep = np.sort(order[:, :size], axis=1).astype(np.int32)
        prompt, sample, is_free = (
            np.take_along_axis(x, keep, axis=1) for x in (self.prompt, self.sample, self.is_free)
        )
        return Rows(prompt, sample, is_free), keep.reshape(-1)

    def halves(self, count: int) -> tuple[Rows, Rows]:
        """The same rows twice: `count` of a shard are live in the first, others in the second."""
        order = np.cumsum(~self.is_free, axis=1)
        return (
            dataclasses.replace(self, is_free=self.is_free | (order > count)),
            dataclasses.replace(self, is_free=self.is_free | (order <= count)),
        )

    def without(self, is_done: np.ndarray) -> Rows:
        """The same rows, those of `is_done` [R] free."""
        return dataclasses.replace(self, is_free=self.is_free | is_done.reshape(self.prompt.shape))
