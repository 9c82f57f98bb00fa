"""M-RoPE position ids of a prompt: three ids (time, row, column) for every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speciarl_jax.arch import Arch


def mrope_positions(
    tokens: np.ndarray, image_grids: Sequence[tuple[int, int, int]], arch: Arch
) -> tuple[np.ndarray, int]:
    """Position ids of one unpadded prompt whose image placeholders are already expanded.

    Text tokens count on by one in all three ids. An image that starts at id p gives its merged
    token in row r, column c the ids (p, p + r, p + c); the text after it goes on from
    p + max(rows, columns), that is from far fewer ids than the image has tokens.

    Args:
        tokens: [S] int, no padding.
        image_grids: (1, rows, columns) in patches of each image, in order of appearance.
        arch: gives the placeholder's id and the merge size.

    Returns:
        positions: [3, S] int32, rows t, h, w.
        delta: largest id + 1 - S; the c-th completion token has id S + delta + c.

    Raises:
        ValueError: no tokens, video tokens, or placeholder tokens that do not match the grids.
    Source: transformers Qwen2_5_VLModel.get_rope_index.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"prompt tokens have shape {tokens.shape}: expected [S] with S >= 1")
    if np.any(tokens == arch.video_token_id):
        raise ValueError("prompt holds video tokens; only images and text are implemented")
    length = len(tokens)
    positions = np.empty((3, length), np.int32)
    is_image = tokens == arch.image_token_id
    start, next_id = 0, 0
    for number, grid in enumerate(image_grids):
        rows = grid[1] // arch.vision.spatial_merge_size
        cols = grid[2] // arch.vision.spatial_merge_size
        first = start + int(np.argmax(is_image[start:])) if start < length else length
        stop = first + rows * cols
        if stop > length or not is_image[first:stop].all():
            raise ValueError(
                f"image {number} of {rows}x{cols} merged tokens: the prompt has no run of "
                f"{rows * cols} placeholder tokens (id {arch.image_token_id}) for it"
            )
        positions[:, start:first] = np.arange(next_id, next_id + first - start)
        next_id += first - start
        positions[0, first:stop] = next_id
        positions[1, first:stop] = next_id + np.repeat(np.arange(rows), cols)
        positions[2, first:stop] = next_id + np.tile(np.arange(cols), rows)
        next_id += max(rows, cols)
        start = stop
    if is_image[start:].any():
        raise ValueError(
            f"prompt has {int(is_image.sum())} placeholder tokens, more than its "
            f"{len(image_grids)} images account for"
        )
    positions[:, start:] = np.arange(next_id, next_id + length - start)
    return positions, next_id - start  # the last id is next_id + (length - start) - 1
