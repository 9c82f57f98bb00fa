"""M-RoPE ids: by hand, and equal to HF's get_rope_index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speciarl_jax.data.positions import mrope_positions


def _prompt(arch, pieces: list) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Pieces are text lengths or (rows, columns) of merged tokens."""
    tokens: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += [5] * piece
        else:
            rows, cols = piece
            grids.append((1, rows * 2, cols * 2))
            tokens += [arch.image_token_id] * (rows * cols)
    return np.asarray(tokens, np.int32), grids


def _hf(arch, tokens: np.ndarray, grids: list[tuple[int, int, int]]):
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    class Shell:
        config = Qwen2_5_VLConfig(image_token_id=arch.image_token_id)
        get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    kinds = (ids == arch.image_token_id).int()
    grid = torch.tensor(grids) if grids else None
    positions, delta = Qwen2_5_VLModel.get_rope_index(Shell(), ids, kinds, image_grid_thw=grid)
    return positions[:, 0].numpy(), int(delta.reshape(-1)[0])


@pytest.mark.parametrize(
    "pieces",
    [
        [7],
        [3, (2, 2), 4],
        [3, (4, 7), 4],
        [1, (1, 1), 1],
        [5, (1, 40), 3],
        [5, (40, 1), 3],
        [3, (2, 3), 2, (5, 4), 9],
        [3, (2, 3), 2, (5, 4), 1, (3, 3), 2],
        [4, (6, 2)],
        [(2, 2), 3],
        [2, (12, 9), 400],
    ],
    ids=str,
)
def test_equals_hf(pieces, arch):
    tokens, grids = _prompt(arch, pieces)
    expected, expected_delta = _hf(arch, tokens, grids)
    positions, delta = mrope_positions(tokens, grids, arch)
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta
    assert positions.dtype == np.int32


def test_by_hand(arch):
    """Two text tokens, an image of 2 x 3 merged tokens, one text token."""
    tokens, grids = _prompt(arch, [2, (2, 3), 1])
    positions, delta = mrope_positions(tokens, grids, arch)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta == 6 - 9


def test_two_images_without_text_between(arch):
    """HF's grouping cannot tell these apart; the grids can."""
    tokens, grids = _prompt(arch, [1, (1, 2), (2, 1), 1])
    positions, _ = mrope_positions(tokens, grids, arch)
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]


def test_refuses_placeholders_that_do_not_match(arch):
    tokens, grids = _prompt(arch, [2, (2, 3), 1])
    with pytest.raises(ValueError, match="no run of 12"):
        mrope_positions(tokens, [(1, 8, 6)], arch)
    with pytest.raises(ValueError, match="more than its 0 images"):
        mrope_positions(tokens, [], arch)
    with pytest.raises(ValueError, match="no run of 6"):
        mrope_positions(tokens, [*grids, grids[0]], arch)
    with pytest.raises(ValueError, match="expected"):
        mrope_positions(np.zeros(0, np.int32), [], arch)
    with pytest.raises(ValueError, match="video"):
        mrope_positions(np.array([1, arch.video_token_id]), [], arch)
