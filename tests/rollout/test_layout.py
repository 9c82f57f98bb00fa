"""Sizes that are compiled, and what so few of them cost."""

import numpy as np
import pytest

from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.rollout.layout import Rows, column_sizes, next_rows, row_sizes


def test_row_sizes_by_hand():
    assert row_sizes(100) == [100, 75, 57, 43, 33, 25, 19, 10, 5, 3, 2]
    assert row_sizes(2) == [2]
    assert next_rows(25, 100) == 19
    assert next_rows(2, 100) == 0


def test_sizes_on_a_gpu_are_few():
    assert row_sizes(128, has_few=True) == [128, 32, 8]
    assert row_sizes(3, has_few=True) == [3, 1]
    assert next_rows(32, 128, has_few=True) == 8
    assert column_sizes(64, 2048, True, has_few=True) == [512, 2048]
    assert column_sizes(64, 100, True, has_few=True) == [64, 100]
    assert column_sizes(64, 10, True, has_few=True) == [10]
    assert column_sizes(64, 500, False, has_few=True) == [500]


def test_the_gpu_recipe_warms_up_few_programs():
    config, _ = load_recipe("configs/qwen2_5_vl_3b_gpu.py", [])
    rollout, rows = config.rollout, config.train.prompts_per_step * config.rollout.group_size
    columns = column_sizes(rollout.chunk_tokens, rollout.max_completion_tokens, True, has_few=True)
    pairs = len(row_sizes(rows, has_few=True)) * len(columns)
    assert pairs * len(config.data.prompt_buckets) == 12


def test_column_sizes_by_hand():
    assert column_sizes(64, 500, True) == [64, 128, 256, 500]
    assert column_sizes(64, 500, False) == [500]
    assert column_sizes(64, 10, True) == [10]


def test_each_shard_keeps_its_own_live_rows():
    is_free = np.array([[False, True, False, True], [True, True, True, False]])
    rows = Rows(np.arange(8).reshape(2, 4) % 4, np.zeros((2, 4), np.int32), is_free)
    assert rows.most_live() == 2
    small, keep = rows.shrunk(2)
    assert keep.tolist() == [0, 2, 0, 3]  # the second shard keeps row 0 as a filler
    assert small.is_free.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("full", [160, 320, 2560])
def test_four_fifths_of_the_slots_stay_live_at_skewed_lengths(full):
    """Log-normal lengths, median 120, 95 % below 600, at most 2,048; chunks end when rows fit."""
    draws = np.random.default_rng(0).lognormal(np.log(120), np.log(5) / 1.645, (5, full))
    shares = []
    for lengths in np.sort(np.minimum(np.ceil(draws), 2048), axis=1)[:, ::-1]:
        slots, step = 0, 0
        for size, smaller in zip(sizes := row_sizes(full), [*sizes[1:], 0], strict=True):
            end = lengths[smaller]  # the smaller batch holds all that go on from here
            slots, step = slots + size * (end - step), end
        shares.append(lengths.sum() / slots)
    assert np.mean(shares) > 0.8
