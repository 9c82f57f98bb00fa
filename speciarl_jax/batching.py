"""Host side of the update: groups of rollouts to padded, micro-batched device arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from speciarl_jax.types import PromptBatch, Rollout
from speciarl_jax.update import TrainBatch

COMPLETION_BUCKET_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class GroupArrays:
    """Completions of P groups.

    Attributes:
        tokens: [P, G, C] int32, 0 past a completion.
        lengths: [P, G] tokens, stop included.
        rollout_logprobs: [P, G, C] float32, the sampler's.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rollout_logprobs: np.ndarray


def bucket_tokens(length: int, limit: int) -> int:
    """Padded completion length: the next multiple of 16, at most `limit`."""
    padded = -(-length // COMPLETION_BUCKET_TOKENS) * COMPLETION_BUCKET_TOKENS
    return min(max(padded, 1), limit)


def group_arrays(groups: Sequence[Sequence[Rollout]], limit: int) -> GroupArrays:
    """Pads the completions of equal-sized groups; `limit` is the configured maximum length."""
    lengths = np.array([[len(r.completion_tokens) for r in group] for group in groups], np.int32)
    width = bucket_tokens(int(lengths.max()), limit)
    tokens = np.zeros((*lengths.shape, width), np.int32)
    logprobs = np.zeros((*lengths.shape, width), np.float32)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            tokens[p, g, : lengths[p, g]] = rollout.completion_tokens
            logprobs[p, g, : lengths[p, g]] = rollout.rollout_logprobs
    return GroupArrays(tokens, lengths, logprobs)


def make_train_batch(
    batch: PromptBatch,
    groups: GroupArrays,
    weights: np.ndarray,
    advantages: np.ndarray,
    image_embeds: Array | None,
    merge_unit: int,
) -> TrainBatch:
    """Joins prompts with their completions.

    Args:
        batch: P prompts, as many as groups.
        groups: completions.
        weights: [P, G, C] aggregation weights.
        advantages: [P, G].
        image_embeds: [I*M, D] of the frozen tower; None puts the patches in, to train it.
        merge_unit: patches per merged token.
    """
    num_prompts = batch.num_prompts
    vision = batch.vision
    per_prompt = len(vision.patches) // num_prompts
    if image_embeds is None:
        if per_prompt != 1:
            raise ValueError(f"{per_prompt} images per prompt: set model.train_vision=false")
        images = (vision.patches, vision.positions, vision.mask)
    else:
        images = image_embeds.reshape(num_prompts, -1, image_embeds.shape[-1])
    rows_per_prompt = per_prompt * vision.patches.shape[1] // merge_unit
    offset = np.arange(num_prompts, dtype=np.int32)[:, None] * rows_per_prompt
    return TrainBatch(
        tokens=batch.tokens,
        prompt_lengths=batch.prompt_lengths,
        positions=batch.positions,
        next_position=batch.prompt_lengths + batch.position_deltas,
        image_rows=np.where(batch.image_rows >= 0, batch.image_rows - offset, -1),
        images=images,
        completions=groups.tokens,
        weights=weights,
        advantages=advantages.astype(np.float32),
    )


def micro_batches(batch: TrainBatch, rows: slice, prompts_per_micro_batch: int) -> TrainBatch:
    """The prompts `rows` as [U, P/U, ...] leaves."""

    def cut(x: Array | np.ndarray) -> Array | np.ndarray:
        part = x[rows]
        return part.reshape(-1, prompts_per_micro_batch, *part.shape[1:])

    return jax.tree.map(cut, batch)


def join_micro_batches(x: Array) -> Array:
    """[U, P, ...] back to [U*P, ...]."""
    return jnp.reshape(x, (-1, *x.shape[2:]))
