"""Advantages: worked by hand, against float64 loops over Python lists, and as properties."""

from __future__ import annotations

import math
import statistics
import sys
import types

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from speciarl_jax.objective.advantage import group_advantages, has_spread, resolve, rloo_advantages


def arrays(
    rows: list[list[float]], valid: list[list[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    rewards = np.array(rows, dtype=np.float64)
    return rewards, np.ones(rewards.shape, bool) if valid is None else np.array(valid, dtype=bool)


def reference(rewards: list[float], valid: list[bool], kind: str) -> list[float]:
    """One group, with the standard library's own mean and sample standard deviation."""
    kept = [r for r, v in zip(rewards, valid, strict=True) if v]
    mean = statistics.fmean(kept) if len(kept) > 1 else 0.0
    std = statistics.stdev(kept) if len(kept) > 1 else 1.0
    out = []
    for i, (r, v) in enumerate(zip(rewards, valid, strict=True)):
        others = [x for j, x in enumerate(rewards) if valid[j] and j != i]
        if not v:
            out.append(0.0)
        elif kind == "rloo":
            out.append(r - (statistics.fmean(others) if others else 0.0))
        else:
            out.append((r - mean) / (std + 1e-6) if kind == "grpo" else r - mean)
    return out


FUNCTIONS = {
    "grpo": lambda r, v: group_advantages(r, v, norm_by_std=True),
    "dr_grpo": lambda r, v: group_advantages(r, v, norm_by_std=False),
    "rloo": rloo_advantages,
}

groups = st.tuples(st.integers(1, 5), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float64, shape, elements=st.sampled_from([-1, 0, 0.25, 0.5, 0.75, 1, 0.1])),
        hnp.arrays(bool, shape),
    )
)


@pytest.mark.parametrize("kind", FUNCTIONS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(group=groups)
def test_matches_reference(kind: str, group: tuple[np.ndarray, np.ndarray]) -> None:
    rewards, valid = group
    expected = [
        reference(r, v, kind) for r, v in zip(rewards.tolist(), valid.tolist(), strict=True)
    ]
    np.testing.assert_allclose(FUNCTIONS[kind](rewards, valid), expected, rtol=1e-10, atol=1e-10)


def test_grpo_by_hand() -> None:
    # 1, 0, 0, -1: mean 0, sum of squares 2, ddof=1: std sqrt(2/3)
    rewards, valid = arrays([[1, 0, 0, -1]])
    std = math.sqrt(2 / 3) + 1e-6
    got = group_advantages(rewards, valid, norm_by_std=True)
    np.testing.assert_allclose(got, [[1 / std, 0, 0, -1 / std]], rtol=1e-14)
    np.testing.assert_allclose(
        group_advantages(rewards, valid, norm_by_std=True, eps=1.0)[0, 0],
        1 / (math.sqrt(2 / 3) + 1),
    )


def test_dr_grpo_and_rloo_by_hand() -> None:
    rewards, valid = arrays([[1, 0, 0, 1, 1]])
    got = group_advantages(rewards, valid, norm_by_std=False)
    np.testing.assert_allclose(got, [[0.4, -0.6, -0.6, 0.4, 0.4]], rtol=1e-14)
    # leave one out: a 1 sees {0,0,1,1} = .5, a 0 sees {1,0,1,1} = .75
    got = rloo_advantages(rewards, valid)
    np.testing.assert_allclose(got, [[0.5, -0.75, -0.75, 0.5, 0.5]], rtol=1e-14)


def test_missing_labels_beside_a_format_failure_get_nothing() -> None:
    """The released code's bug: zeros for missing labels in a group with a -1 became positive."""
    rewards, valid = arrays([[-1, 0, 0, 1]], [[1, 0, 0, 1]])
    got = group_advantages(rewards, valid, norm_by_std=True)
    half = 1 / (math.sqrt(2) + 1e-6)
    np.testing.assert_allclose(got, [[-half, 0, 0, half]], rtol=1e-14)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_value_of_a_masked_reward_does_not_matter(kind: str) -> None:
    rewards, valid = arrays([[1, 0, 5, -1], [1, 1, 7, 1]], [[1, 1, 0, 1], [1, 1, 0, 1]])
    got = FUNCTIONS[kind](rewards, valid)
    rewards[:, 2] = np.nan
    np.testing.assert_array_equal(FUNCTIONS[kind](rewards, valid), got)
    np.testing.assert_array_equal(got[1], 0)


def test_group_of_one_has_mean_0_std_1() -> None:
    rewards, valid = arrays([[1, 0, 0], [-1, 1, 1]], [[1, 0, 0], [1, 0, 0]])
    got = group_advantages(rewards, valid, norm_by_std=True)
    np.testing.assert_allclose(got, [[1 / 1.000001, 0, 0], [-1 / 1.000001, 0, 0]], rtol=1e-14)
    for kind in ("dr_grpo", "rloo"):
        np.testing.assert_array_equal(FUNCTIONS[kind](rewards, valid), [[1, 0, 0], [-1, 0, 0]])


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.1, 1.0, 0.3])
def test_all_equal_groups_are_exactly_zero(kind: str, value: float) -> None:
    rewards, valid = np.full((3, 7), value), np.ones((3, 7), bool)
    valid[1, 4:] = False
    valid[2] = False
    got = FUNCTIONS[kind](rewards, valid)
    np.testing.assert_array_equal(got, np.zeros((3, 7)))


@pytest.mark.parametrize("kind", FUNCTIONS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(group=groups, shift=st.sampled_from([-2.0, 0.5, 3.0]))
def test_sum_is_zero_and_a_shift_changes_nothing(
    kind: str, group: tuple[np.ndarray, np.ndarray], shift: float
) -> None:
    rewards, valid = group
    hypothesis.assume(np.all(valid.sum(axis=1) != 1))
    got = FUNCTIONS[kind](rewards, valid)
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-10)
    np.testing.assert_allclose(FUNCTIONS[kind](rewards + shift, valid), got, atol=1e-8)


def test_has_spread() -> None:
    rewards, valid = arrays(
        [[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1], [0.1, 0.1, 0.1], [5, 6, 7]],
        [[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]],
    )
    np.testing.assert_array_equal(
        has_spread(rewards, valid), [False, True, False, False, False, False]
    )


def test_resolve() -> None:
    rewards, valid = arrays([[1, 0, 0, 1, -1]])
    normed, plain = (group_advantages(rewards, valid, norm_by_std=n) for n in (True, False))
    assert not np.allclose(normed, plain)
    for name in ("grpo", "dapo", "gspo"):
        np.testing.assert_array_equal(resolve(name)(rewards, valid), normed)
        np.testing.assert_array_equal(resolve(name, norm_by_std=False)(rewards, valid), plain)
    np.testing.assert_array_equal(resolve("dr_grpo", norm_by_std=True)(rewards, valid), plain)
    np.testing.assert_array_equal(resolve("rloo")(rewards, valid), rloo_advantages(rewards, valid))
    for name in ("sft", "ppo"):
        with pytest.raises(ValueError, match=f"advantage '{name}'"):
            resolve(name)


def test_user_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_advantages")
    module.double = lambda rewards, valid: rewards * 2  # type: ignore[attr-defined]
    module.flat = lambda rewards, valid: rewards[0]  # type: ignore[attr-defined]
    module.broken = lambda rewards, valid: rewards / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_advantages", module)
    rewards, valid = arrays([[1, 3], [2, -1]], [[1, 0], [1, 1]])
    got = resolve("my_advantages.double")(rewards, valid)
    np.testing.assert_array_equal(got, [[2, 0], [4, -2]])  # not valid: 0, whatever it returns
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(2, 2\)"):
        resolve("my_advantages.flat")(rewards, valid)
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="not finite"):
        resolve("my_advantages.broken")(rewards, valid)
    with pytest.raises(ValueError, match="no function 'triple'"):
        resolve("my_advantages.triple")
