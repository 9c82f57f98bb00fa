"""The update against a trainer written on torch, from the same start on the same rollouts.

What the two sides are, and why the tolerance is what it is: `tests.support.trajectory`. Here two
steps of two updates; `make trajectory` runs twenty of two and of four, for every algorithm.
"""

import pytest

from tests.support.trajectory import ALGORITHMS, run_trajectory, shortcomings, trajectory_config

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name != "grpo"]


@pytest.mark.parametrize("name", ["grpo", *OTHERS])
def test_adapter_follows_the_same_path_as_torchs(name):
    """Old and reference log-probs, reward, advantage, clips, KL, importance, sums, AdamW, warm-up.

    The first update has rate 0 on both sides, the last one acts on ratios that are not 1.
    """
    gaps = list(run_trajectory(trajectory_config(name, num_steps=2, updates_per_step=2)))
    assert [(gap.step, gap.update) for gap in gaps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert gaps[0].element == 0
    assert shortcomings(gaps) == []
