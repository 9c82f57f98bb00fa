"""Host side of the update: groups of rollouts to padded, micro-batched device arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.images import VisionArrays
from speciarl_jax.devices.layout import AnyArray
from speciarl_jax.learner.logprobs import TreeBatch
from speciarl_jax.types import Rollout

Batch = TypeVar("Batch")
Value = TypeVar("Value")
_STEP, _RATIO = 16, 1.25  # of the padded completion lengths


@dataclasses.dataclass(frozen=True)
class Completions:
    """Completions of P groups.

    Attributes:
        completion_tokens: [P, G, C] int32, 0 past a completion.
        lengths: [P, G] tokens, stop included.
        rollout_logprobs: [P, G, C] float32, the sampler's.
    """

    completion_tokens: np.ndarray
    lengths: np.ndarray
    rollout_logprobs: np.ndarray


def bucket_tokens(tokens: int, limit: int) -> int:
    """Padded completion length: the next of 16, 32, 48, 64, 80, 112, 144, ..., at most `limit`.

    Each is at most a quarter and 16 tokens above the last, so that few programs are compiled.

    Args:
        tokens: 0..`limit`.
        limit: the configured maximum, or the padded length of the step's arrays.
    """
    size = _STEP
    while size < tokens:
        size = math.ceil(size * _RATIO / _STEP) * _STEP
    return min(size, limit)


def pad_completions(
    groups: Sequence[Sequence[Rollout]], limit: int, longest: int = 0
) -> Completions:
    """Pads this process's equal-sized groups; `longest` is that of all, which pad alike."""
    lengths = np.array([[len(r.completion_tokens) for r in group] for group in groups], np.int32)
    width = bucket_tokens(max(int(lengths.max()), longest), limit)
    tokens = np.zeros((*lengths.shape, width), np.int32)
    logprobs = np.zeros((*lengths.shape, width), np.float32)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            tokens[p, g, : lengths[p, g]] = rollout.completion_tokens
            logprobs[p, g, : lengths[p, g]] = rollout.rollout_logprobs
    return Completions(tokens, lengths, logprobs)


def make_tree(
    batch: PromptBatch, completions: Completions, image_embeds: AnyArray | None
) -> TreeBatch[AnyArray]:
    """Joins P prompts with their P groups.

    `image_embeds` [I*M, D] are the frozen tower's; None puts the patches in, to train it.

    Raises:
        ValueError: the tower is trained and a prompt has several images.
    """
    num_prompts, vision = batch.num_prompts, batch.vision
    images: AnyArray | tuple[AnyArray, AnyArray, AnyArray]
    if image_embeds is None:
        per_prompt = len(vision.patches) // num_prompts
        if per_prompt != 1:
            raise ValueError(f"{per_prompt} images per prompt: set model.train_vision=false")
        images = (vision.patches, vision.positions, vision.mask)
    else:
        images = image_embeds.reshape(num_prompts, -1, image_embeds.shape[-1])
    return TreeBatch[AnyArray](
        prompt_tokens=batch.tokens,
        prompt_lengths=batch.prompt_lengths,
        positions=batch.positions,
        next_position=batch.prompt_lengths + batch.position_deltas,
        image_rows=batch.image_rows,
        images=images,
        completion_tokens=completions.completion_tokens,
    )


def micro_batches(batch: Batch, rows: slice, prompts_per_micro_batch: int) -> Batch:
    """The prompts `rows` of a `TreeBatch` or `TrainBatch` as [U, P/U, ...] leaves."""

    def cut(x: AnyArray) -> AnyArray:
        part = x[rows]
        return part.reshape(-1, prompts_per_micro_batch, *part.shape[1:])

    micro: Batch = jax.tree.map(cut, batch)
    return micro


def join_micro_batches(x: AnyArray) -> Array:
    """[U, P, ...] back to [U*P, ...]."""
    return jnp.reshape(x, (-1, *x.shape[2:]))


def prompt_shape(batch: PromptBatch) -> tuple[int, int, int]:
    """(padded prompt tokens, images per prompt, padded patches per image)."""
    mask = batch.vision.mask
    return batch.tokens.shape[1], len(mask) // batch.num_prompts, mask.shape[1]


def join_batches(
    parts: Sequence[tuple[PromptBatch, AnyArray | None]],
    rows: np.ndarray,
    merge_unit: int,
    pad_id: int,
    at_least: tuple[int, int, int] = (0, 0, 0),
) -> tuple[PromptBatch, Array | None]:
    """Chosen prompts of several batches as one batch, padded to the largest shapes among them.

    Args:
        parts: batches with their image embeddings [I*M, D], or all without; shapes may differ.
        rows: [P] prompts to take, counted over the batches in order.
        merge_unit: patches per merged token.
        pad_id: token past the end of a prompt.
        at_least: (prompt tokens, images per prompt, patches per image) to pad to at least.

    Returns:
        (the batch, its image embeddings [I*M, D] or None).
    """
    batches = [batch for batch, _ in parts]
    sizes = np.array([at_least, *(prompt_shape(batch) for batch in batches)])
    length, slots, patches = (int(size) for size in sizes.max(axis=0))
    image_rows = [_wider_rows(b, patches // merge_unit, merge_unit) for b in batches]

    def pick(name: str, fill: int) -> np.ndarray:
        return _pick([getattr(b, name) for b in batches], rows, length, fill)

    def pick_list(values_of: Callable[[PromptBatch], list[Value]]) -> list[Value]:
        values = [value for b in batches for value in values_of(b)]
        return [values[row] for row in rows]

    joined = PromptBatch(
        prompt_ids=pick_list(lambda b: b.prompt_ids),
        ground_truths=pick_list(lambda b: b.ground_truths),
        datasets=pick_list(lambda b: b.datasets),
        images=pick_list(lambda b: b.images),
        tokens=pick("tokens", pad_id),
        prompt_lengths=pick("prompt_lengths", 0),
        positions=pick("positions", 0),
        position_deltas=pick("position_deltas", 0),
        image_rows=_pick(image_rows, rows, length, -1),
        vision=VisionArrays(*(_join_images(batches, rows, slots, patches))),
        global_index=pick("global_index", 0),
        is_real=pick("is_real", 0),
    )
    tables = [_image_grid(x, b, slots, patches, merge_unit) for b, x in parts if x is not None]
    if not tables:
        return joined, None
    table = jnp.take(jnp.concatenate(tables), rows, axis=0)  # [P, slots, M, D]
    return joined, table.reshape(-1, table.shape[-1])


def _pick(arrays: Sequence[np.ndarray], rows: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Rows of arrays that differ in their last axis, which is padded to `length` if it is S."""

    def widen(x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:
            return x
        pad = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
        return np.pad(x, pad, constant_values=fill)

    picked: np.ndarray = np.concatenate([widen(x) for x in arrays])[rows]
    return picked


def _wider_rows(batch: PromptBatch, merged: int, merge_unit: int) -> np.ndarray:
    """[P, S] `image_rows` for images padded to `merged` tokens each."""
    slot, row = np.divmod(batch.image_rows, batch.vision.mask.shape[1] // merge_unit)
    return np.where(batch.image_rows >= 0, slot * merged + row, -1).astype(np.int32)


def _join_images(
    batches: Sequence[PromptBatch], rows: np.ndarray, slots: int, patches: int
) -> list[np.ndarray]:
    """Patches, positions and mask of the chosen prompts, [P*slots, patches, ...]."""
    joined = []
    for name in ("patches", "positions", "mask"):
        grids = []
        for b in batches:
            x = getattr(b.vision, name)
            x = x.reshape(b.num_prompts, -1, *x.shape[1:])
            pad = [(0, 0), (0, slots - x.shape[1]), (0, patches - x.shape[2])]
            grids.append(np.pad(x, pad + [(0, 0)] * (x.ndim - 3)))
        chosen = np.concatenate(grids)[rows]
        joined.append(chosen.reshape(-1, *chosen.shape[2:]))
    return joined


def _image_grid(
    table: AnyArray, batch: PromptBatch, slots: int, patches: int, merge_unit: int
) -> Array:
    """[I*M, D] as [P, slots, patches / merge_unit, D]."""
    old_merged = batch.vision.mask.shape[1] // merge_unit
    grid = table.reshape(batch.num_prompts, -1, old_merged, table.shape[-1])
    pad = ((0, 0), (0, slots - grid.shape[1]), (0, patches // merge_unit - old_merged), (0, 0))
    return jnp.pad(grid, pad)
