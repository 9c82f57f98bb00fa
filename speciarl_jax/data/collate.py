"""Encoded prompts to one padded `PromptBatch`, in a few shapes so that little compiles."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np

from speciarl_jax.arch import Arch
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.images import ImageLimits, VisionArrays, grid_of, num_windows
from speciarl_jax.data.prompts import EncodedPrompt

PROMPT_BUCKET_TOKENS = 32
WINDOW_BUCKETS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 20, 25, 30, 36, 42, 49, 56, 64, 80, 100, 128, 160)


def prompt_bucket(tokens: int, buckets: Sequence[int] = ()) -> int:
    """Padded prompt length for a batch whose longest prompt has `tokens` tokens.

    One of the ascending `buckets`, or without any the next multiple of 32.

    Raises:
        ValueError: longer than the largest bucket.
    """
    if not buckets:
        return math.ceil(tokens / PROMPT_BUCKET_TOKENS) * PROMPT_BUCKET_TOKENS
    return _bucket(tokens, buckets, "prompt of {} tokens", "data.max_prompt_tokens")


def window_bucket(windows: int, buckets: Sequence[int] = ()) -> int:
    """Padded number of windows for a batch whose largest image has `windows` windows.

    One of the ascending `buckets`, or without any by steps of at most about a third.

    Raises:
        ValueError: more than the largest of the buckets that were given.
    """
    if not buckets:
        if windows > WINDOW_BUCKETS[-1]:
            return math.ceil(windows / 64) * 64
        buckets = WINDOW_BUCKETS
    return _bucket(windows, buckets, "image of {} windows", "data.max_pixels")


def _bucket(size: int, buckets: Sequence[int], what: str, remedy: str) -> int:
    place = bisect.bisect_left(buckets, size)
    if place == len(buckets):
        raise ValueError(
            f"{what.format(size)}: larger than the largest bucket {buckets[-1]}; lower {remedy} or "
            "add a bucket"
        )
    return buckets[place]


def collate(
    encoded: Sequence[EncodedPrompt],
    arch: Arch,
    limits: ImageLimits,
    pad_id: int,
    num_prompts: int = 0,
    prompt_buckets: Sequence[int] = (),
    window_buckets: Sequence[int] = (),
    images_per_prompt: int = 0,
    global_index: Sequence[int] | None = None,
) -> PromptBatch:
    """Pads prompts and images to common shapes.

    Image slots belong to prompts, `images_per_prompt` each, so that images shard with their
    prompts: image j of prompt p sits in slot p * images_per_prompt + j. Rows past the last prompt
    are padding: `is_real` False, a single pad token, no image.

    Args:
        encoded: 1 to num_prompts prompts.
        arch: token ids, window and merge sizes.
        limits: mean and std of the pixels.
        pad_id: token written past the end of a prompt.
        num_prompts: P; 0 for as many as there are.
        prompt_buckets: see `prompt_bucket`.
        window_buckets: see `window_bucket`.
        images_per_prompt: slots per prompt; 0 for the largest number in the batch.
        global_index: of the first rows or of all; rows without one count on from the last. None
            numbers them from 0.

    Raises:
        ValueError: no prompts, more prompts than rows or images than slots, or a bucket too small.
    """
    rows = num_prompts or len(encoded)
    slots = images_per_prompt or max([len(item.pixels) for item in encoded] + [1])
    _check_counts(encoded, rows, slots)
    length = prompt_bucket(max([item.longest_tokens for item in encoded] + [1]), prompt_buckets)
    grids = [grid_of(pixels, arch.vision) for item in encoded for pixels in item.pixels]
    windows = window_bucket(
        max([num_windows(grid, arch.vision) for grid in grids] + [1]), window_buckets
    )
    vision = VisionArrays.empty(rows * slots, windows, arch.vision)
    merged_per_slot = windows * arch.vision.window_side**2

    tokens = np.full((rows, length), pad_id, np.int32)
    lengths = np.ones(rows, np.int32)
    positions = np.zeros((rows, 3, length), np.int32)
    deltas = np.zeros(rows, np.int32)
    image_rows = np.full((rows, length), -1, np.int32)
    for row, item in enumerate(encoded):
        count = len(item.tokens)
        tokens[row, :count] = item.tokens
        lengths[row] = count
        positions[row, :, :count] = item.positions
        deltas[row] = item.delta
        merged: list[np.ndarray] = []
        for slot, pixels in enumerate(item.pixels):
            layout = vision.fill_windows(row * slots + slot, pixels, arch.vision, limits)
            merged.append(slot * merged_per_slot + layout.merged_rows)
        if merged:
            image_rows[row, :count][item.tokens == arch.image_token_id] = np.concatenate(merged)
    padding = rows - len(encoded)
    index = list(global_index or [0])
    index += range(index[-1] + 1, index[-1] + 1 + rows - len(index))
    return PromptBatch(
        prompt_ids=[item.prompt_id for item in encoded] + [""] * padding,
        ground_truths=[item.ground_truth for item in encoded] + [""] * padding,
        datasets=[item.dataset for item in encoded] + [""] * padding,
        images=[item.images[0] if item.images else b"" for item in encoded] + [b""] * padding,
        tokens=tokens,
        prompt_lengths=lengths,
        positions=positions,
        position_deltas=deltas,
        image_rows=image_rows,
        vision=vision,
        global_index=np.asarray(index, np.int64),
        is_real=np.arange(rows) < len(encoded),
    )


def _check_counts(encoded: Sequence[EncodedPrompt], rows: int, slots: int) -> None:
    if rows < 1:
        raise ValueError("a batch needs at least one row; set num_prompts or pass prompts")
    if len(encoded) > rows:
        raise ValueError(f"{len(encoded)} prompts do not fit into num_prompts={rows} rows")
    most = max([len(item.pixels) for item in encoded] + [0])
    if most > slots:
        raise ValueError(f"a prompt has {most} images, more than images_per_prompt={slots}")
