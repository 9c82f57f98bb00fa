"""Rewards: worked by hand, against a loop written from the paper's text, and as properties."""

from __future__ import annotations

import itertools
import math
import sys
import types

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from speciarl_jax.config.schema import REWARDS
from speciarl_jax.objective.reward import (
    FORMAT_FAILURE,
    NO_BAR,
    UNLABELLED,
    apply_label_noise,
    bar,
    category_codes,
    dropped_groups,
    overlong_penalty,
    rewards,
    valid_mask,
)
from speciarl_jax.types import Category, Failure, FailureKind, Rollout, Verdict

W, A, G, L, S, M = range(6)  # wrong, abstain, generic, less_specific, specific, more_specific
F, U = FORMAT_FAILURE, UNLABELLED


def codes_of(*groups: list[int]) -> np.ndarray:
    return np.array(groups, dtype=np.int64)


code_arrays = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.integers(FORMAT_FAILURE, int(Category.MORE_SPECIFIC)),
)


# --- a reference in plain Python, one group at a time -------------------------------------------


def reference_bar(group: list[int], support: float) -> int | None:
    labels = [c for c in group if c >= 0]
    if not labels:
        return None
    present = [c for c in group if c != U]
    needed = int(support) if support >= 1 else max(1, math.ceil(round(support * len(present), 6)))
    ranked = sorted(labels, reverse=True)
    best = ranked[needed - 1] if needed <= len(ranked) else W
    return {M: S, W: A}.get(best, best)


def reference_reward(name: str, group: list[int], support: float) -> list[float]:
    static = {
        "binary": [0, 0, 0, 0, 1, 1],
        "scale1": [0, 0.25, 0.5, 0.75, 1, 1],
        "scale2": [0, 0, 0.5, 0.75, 1, 1],
        "scale3": [0, 0, 0, 0.75, 1, 1],
    }
    top = reference_bar(group, support)
    out, is_taken = [], False
    for code in group:
        if code == F:
            out.append(-1.0)
        elif code == U:
            out.append(0.0)
        elif name in static:
            out.append(float(static[name][code]))
        else:
            wins = top is not None and code >= top and not (name == "single" and is_taken)
            is_taken = is_taken or wins
            out.append(1.0 if wins else 0.0)
    return out


# --- the bar and the dynamic reward ------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "expected_bar", "expected"),
    [
        ([L, G, W, L], L, [1, 0, 0, 1]),
        ([M, S, L, W], S, [1, 1, 0, 0]),  # specific and more_specific tie at the top
        ([S, S, S, S], S, [1, 1, 1, 1]),
        ([W, W, W, W], A, [0, 0, 0, 0]),  # all wrong: nobody reaches abstain
        ([W, A, W, A], A, [0, 1, 0, 1]),
        ([G, A, W, G], G, [1, 0, 0, 1]),
        ([F, G, W, A], G, [-1, 1, 0, 0]),  # a format failure takes no part in c_best
        ([F, F, F, F], NO_BAR, [-1, -1, -1, -1]),
        ([U, F, F, F], NO_BAR, [0, -1, -1, -1]),
        ([U, G, W, F], G, [0, 1, 0, -1]),
        ([W, F, W, F], A, [0, -1, 0, -1]),
    ],
)
def test_dynamic_reward_by_hand(group: list[int], expected_bar: int, expected: list[int]) -> None:
    assert bar(np.array(group)) == expected_bar
    np.testing.assert_array_equal(rewards("dynamic", codes_of(group))[0], expected)


def test_groups_do_not_see_each_other() -> None:
    got = rewards("dynamic", codes_of([S, G, W], [G, A, W], [W, W, W]))
    np.testing.assert_array_equal(got, [[1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_group_of_one() -> None:
    got = rewards("dynamic", codes_of([G], [W], [F], [U], [A]))
    np.testing.assert_array_equal(got[:, 0], [1, 0, -1, 0, 1])


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([W, L, G, L], [0, 1, 0, 0]),
        ([S, M, S, W], [1, 0, 0, 0]),  # specific ties with more_specific: the first of either
        ([M, S, W, W], [1, 0, 0, 0]),
        ([W, W, W, W], [0, 0, 0, 0]),
        ([F, G, G, U], [-1, 1, 0, 0]),
    ],
)
def test_single_reward_by_hand(group: list[int], expected: list[int]) -> None:
    np.testing.assert_array_equal(rewards("single", codes_of(group))[0], expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # wrong, abstain, generic, less, specific, more, format failure, unlabelled
        ("binary", [0, 0, 0, 0, 1, 1, -1, 0]),
        ("scale1", [0, 0.25, 0.5, 0.75, 1, 1, -1, 0]),
        ("scale2", [0, 0, 0.5, 0.75, 1, 1, -1, 0]),
        ("scale3", [0, 0, 0, 0.75, 1, 1, -1, 0]),
    ],
)
def test_static_rewards_table(name: str, expected: list[float]) -> None:
    np.testing.assert_array_equal(rewards(name, codes_of([W, A, G, L, S, M, F, U]))[0], expected)


# --- bar by support -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "support", "expected"),
    [
        ([S, G, G, W, W], 1, S),
        ([S, G, G, W, W], 2, G),  # one lucky specific, but two others reach generic
        ([S, G, W, W, W], 2, G),  # specific reaches generic too: two answers do
        ([S, W, W, W, W], 2, A),  # only wrong is reached twice
        ([S, M, W, W, W], 2, S),
        ([S, F, F, F, F], 2, A),  # fewer labels than m: as if the others had been wrong
        ([S, S, G, W, W], 0.4, S),  # a share: 2 of 5
        ([S, S, G, W, W], 0.41, G),  # rounded up to 3 of 5
        ([S, W, W, W, W], 0.01, S),  # never less than one answer
        ([S, S, U, U, U], 0.9, S),  # unlabelled answers are not there: 2 of 2
        ([S, S, F, F, F], 0.9, A),  # format failures are: 2 of 5
        ([F, F, F, F, F], 2, NO_BAR),
    ],
)
def test_bar_by_support_by_hand(group: list[int], support: float, expected: int) -> None:
    assert bar(np.array(group), support) == expected


def test_share_is_exact_where_binary_floats_are_not() -> None:
    assert 0.28 * 25 > 7  # and yet seven answers must do, and six must not
    assert bar(np.array([S] * 7 + [W] * 18), 0.28) == S
    assert bar(np.array([S] * 6 + [W] * 19), 0.28) == A
    assert bar(np.array([S] * 3 + [W] * 7), 0.3) == S


def test_support_changes_who_is_paid() -> None:
    group = codes_of([S, G, G, A, W])
    np.testing.assert_array_equal(rewards("dynamic", group, 1)[0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards("dynamic", group, 2)[0], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rewards("single", group, 2)[0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(rewards("binary", group, 2)[0], [1, 0, 0, 0, 0])


@pytest.mark.parametrize("support", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_bar_support_out_of_range(support: float) -> None:
    with pytest.raises(ValueError, match="bar_support"):
        bar(np.array([S, W]), support)


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(codes=code_arrays, support=st.sampled_from([1, 2, 3, 0.1, 0.3, 0.5, 0.75]))
def test_matches_reference(name: str, codes: np.ndarray, support: float) -> None:
    expected = [reference_reward(name, group, support) for group in codes.tolist()]
    np.testing.assert_array_equal(rewards(name, codes, support), expected)


@pytest.mark.parametrize("name", [n for n in REWARDS if n != "single"])
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(codes=code_arrays)
def test_reward_is_monotone_in_category(name: str, codes: np.ndarray) -> None:
    for group, reward in zip(codes, rewards(name, codes), strict=True):
        judged = sorted(zip(group[group >= 0], reward[group >= 0], strict=True))
        assert all(low[1] <= high[1] for low, high in itertools.pairwise(judged))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(codes=code_arrays, seed=st.integers(0, 99))
def test_order_matters_to_single_only(codes: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(codes.shape[1])
    np.testing.assert_array_equal(
        rewards("dynamic", codes[:, order]), rewards("dynamic", codes)[:, order]
    )
    single = rewards("single", codes)
    np.testing.assert_array_equal(
        np.sum(single == 1, axis=1), np.any(codes > W, axis=1).astype(int)
    )
    assert np.all(rewards("dynamic", codes)[single == 1] == 1)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(codes=code_arrays)
def test_more_support_never_raises_the_bar(codes: np.ndarray) -> None:
    bars = np.stack([bar(codes, m) for m in (1, 2, 3, 5)])
    assert np.all(np.diff(bars, axis=0) <= 0)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(codes=code_arrays)
def test_leaving_oneself_out_changes_nothing_at_m_1(codes: np.ndarray) -> None:
    """A leave-one-out bar pays the same answers as m = 1 (method: "identical")."""
    for group, reward in zip(codes.tolist(), rewards("dynamic", codes), strict=True):
        for i, code in enumerate(group):
            others = bar(np.array([*group[:i], F, *group[i + 1 :]]))
            floor = A if others == NO_BAR else others
            if code >= 0:
                assert reward[i] == float(code >= floor)


# --- codes and masks ----------------------------------------------------------------------------


def rollout(prediction: str | None, outcome: Verdict | Failure | None) -> Rollout:
    empty = np.zeros(0, np.float32)
    return Rollout(
        "p", "d", "t", 3, empty.astype(np.int32), empty, "", prediction, False, 0, outcome
    )


TIMEOUT = Failure(FailureKind.TIMEOUT, "no answer")


def test_category_codes() -> None:
    groups = [
        [rollout("a", Verdict(c, "exact")) for c in (Category.WRONG, Category.MORE_SPECIFIC)],
        [rollout(None, None), rollout("b", TIMEOUT)],
        [rollout(None, TIMEOUT), rollout("c", Verdict(Category.GENERIC, "judge"))],
    ]
    got = category_codes(groups)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, [[W, M], [F, U], [F, G]])


def test_category_codes_refuses_what_is_not_judged_or_ragged() -> None:
    judged = rollout("a", TIMEOUT)
    with pytest.raises(ValueError, match=r"p#3 has a prediction but no outcome"):
        category_codes([[judged, rollout("a", None)]])
    with pytest.raises(ValueError, match=r"different sizes \[1, 2\]"):
        category_codes([[judged], [judged, judged]])
    assert category_codes([]).shape == (0, 0)


def test_quorum_by_hand() -> None:
    # N = 10 at .2: two missing labels are tolerated, three drop the group
    two, three = [U] * 2 + [S, F] * 4, [U] * 3 + [S] * 7
    codes = codes_of(two, three, [F] * 10, [U] * 10)
    np.testing.assert_array_equal(dropped_groups(codes, 0.2), [False, True, False, True])
    got = valid_mask(codes, 0.2)
    np.testing.assert_array_equal(got[0], [False] * 2 + [True] * 8)
    assert not got[1].any()
    assert got[2].all()
    assert not got[3].any()


@pytest.mark.parametrize(
    ("size", "frac", "allowed"),
    [(5, 0.2, 1), (4, 0.2, 0), (15, 0.2, 3), (100, 0.29, 29), (10, 0.0, 0), (10, 1.0, 10)],
)
def test_quorum_rounds_down_exactly(size: int, frac: float, allowed: int) -> None:
    codes = np.array([[U] * n + [S] * (size - n) for n in range(size + 1)])
    assert np.sum(~dropped_groups(codes, frac)) == allowed + 1


@pytest.mark.parametrize("frac", [-0.1, 1.1, float("nan")])
def test_quorum_out_of_range(frac: float) -> None:
    with pytest.raises(ValueError, match="failed_quorum_frac"):
        valid_mask(codes_of([S]), frac)


# --- overlong penalty ---------------------------------------------------------------------------


def test_overlong_penalty_by_hand() -> None:
    lengths = np.array([[1, 1536, 1537, 1792, 2047, 2048]])
    got = overlong_penalty(lengths, 2048, 512)
    np.testing.assert_allclose(got, [[0, 0, -1 / 512, -0.5, -511 / 512, -1]], rtol=1e-15)
    np.testing.assert_array_equal(overlong_penalty(lengths, 2048, 0), np.zeros((1, 6)))
    with pytest.raises(ValueError, match="2049 tokens"):
        overlong_penalty(lengths, 2048, 2049)


# --- label noise --------------------------------------------------------------------------------


def test_noise_moves_one_rung_at_the_right_rate() -> None:
    codes = np.tile(np.array([W, A, G, L, S, M, F, U]), (4000, 5))  # 20,000 of each
    noisy = apply_label_noise(codes, 0.25, seed=3, step=7, global_index=np.arange(4000))
    # 4.5 standard errors of a rate .25 (.125) over 20,000 draws: .0138 (.0105)
    expected = {W: {A: 0.25}, S: {L: 0.25}, M: {L: 0.25}, F: {}, U: {}}
    expected |= {c: {c - 1: 0.125, c + 1: 0.125} for c in (A, G, L)}
    for code, moves in expected.items():
        seen, counts = np.unique(noisy[codes == code], return_counts=True)
        shares = dict(zip(seen.tolist(), counts / 20_000, strict=True))
        assert set(shares) == {code, *moves}
        for target, rate in moves.items():
            assert abs(shares[target] - rate) < (0.0138 if rate == 0.25 else 0.0105)


def test_noise_at_0_and_1() -> None:
    codes, index = codes_of([W, A, G, L, S, M, F, U]), np.array([5])
    before = codes.copy()
    np.testing.assert_array_equal(apply_label_noise(codes, 0.0, 0, 0, index), codes)
    moved = apply_label_noise(codes, 1.0, 0, 0, index)[0]
    np.testing.assert_array_equal(np.abs(moved[:5] - codes[0, :5]), 1)
    np.testing.assert_array_equal(moved[[0, 4, 5, 6, 7]], [A, L, L, F, U])
    np.testing.assert_array_equal(codes, before)


def test_noise_ignores_the_batch_split() -> None:
    rng = np.random.default_rng(0)
    codes, index = rng.integers(-2, 6, (12, 10)), rng.permutation(3000)[:12]
    whole = apply_label_noise(codes, 0.5, 1, 2, index)
    for size in (1, 5):
        parts = [
            apply_label_noise(codes[i : i + size], 0.5, 1, 2, index[i : i + size])
            for i in range(0, 12, size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = rng.permutation(12)
    np.testing.assert_array_equal(
        apply_label_noise(codes[order], 0.5, 1, 2, index[order]), whole[order]
    )
    np.testing.assert_array_equal(apply_label_noise(codes[:, :4], 0.5, 1, 2, index), whole[:, :4])


def test_noise_differs_between_seeds_steps_and_prompts() -> None:
    codes, index = np.full((50, 10), G), np.arange(50)
    base = apply_label_noise(codes, 0.5, 1, 2, index)
    variants = [
        apply_label_noise(codes, 0.5, 2, 1, index),
        apply_label_noise(codes, 0.5, 1, 3, index),
        apply_label_noise(codes, 0.5, 1, 2, index + 50),
    ]
    for other in variants:
        assert 0.4 < np.mean(base != other) < 0.85  # .625 expected of independent draws
    assert len({row.tobytes() for row in base}) == 50


@pytest.mark.parametrize(("prob", "seed"), [(-0.1, 0), (1.1, 0), (0.1, -1)])
def test_noise_out_of_range(prob: float, seed: int) -> None:
    with pytest.raises(ValueError, match="label noise"):
        apply_label_noise(codes_of([S]), prob, seed, 0, np.array([0]))


# --- a user's own -------------------------------------------------------------------------------


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("my_rewards")
    module.half = lambda codes: codes / 2.0  # type: ignore[attr-defined]
    module.flat = lambda codes: np.zeros(3)  # type: ignore[attr-defined]
    module.broken = lambda codes: codes * np.nan  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


@pytest.mark.usefixtures("user_module")
def test_user_reward() -> None:
    got = rewards("my_rewards.half", codes_of([S, F, U]))
    np.testing.assert_array_equal(got, [[2.0, -1.0, 0.0]])  # unlabelled stays a placeholder


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards.flat", r"shape \(3,\), expected \(1, 2\)"),
        ("my_rewards.broken", "not finite"),
        ("my_rewards.absent", "no function 'absent'"),
        ("my_rewards.number", "no function 'number'"),
        ("no_such_module_here.f", "no_such_module_here"),
        ("dynamo", "expected one of dynamic, single"),
    ],
)
def test_user_reward_that_does_not_work(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards(name, codes_of([S, W]))
