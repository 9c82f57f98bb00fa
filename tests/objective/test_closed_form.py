"""Rewards, advantages and loss in a world whose expected gradient is a finite sum."""

import pathlib

import numpy as np
import pytest

from tests.support import tabular

SIZES = (5, 10, 15)
LOGITS = np.log([0.3, 0.5, 0.2])


@pytest.mark.parametrize(
    ("group_size", "algo", "support"),
    [(5, "grpo", 1), (15, "grpo", 0.3), (10, "dr_grpo", 1), (15, "rloo", 2)],
)
def test_sampled_gradients_average_to_the_enumerated(group_size, algo, support):
    """12,000 groups; each component within four standard errors, the largest 15 away from 0."""
    settings = (LOGITS, 0.4, group_size, algo, support)
    exact = tabular.exact_gradient(*settings)
    sampled = tabular.sampled_gradients(np.random.default_rng(0), 120, *settings)
    error = sampled.std(0, ddof=1) / np.sqrt(len(sampled))
    assert exact.dtype == sampled.dtype == np.float64
    assert (np.abs(sampled.mean(0) - exact) < 4 * error).all()
    assert np.max(np.abs(exact) / error) > 15
    assert exact.sum() == pytest.approx(0, abs=1e-12)  # a softmax shifts nothing


def test_enumeration_by_hand():
    """Two answers, Dr.GRPO: a right guess beats the generic name by half a reward, and so on.

    guess-generic: right +1/2, -1/2; wrong -1/2, +1/2. guess-guess, one right: +1/2, -1/2. The rest
    is flat. With p = .3, q = .4 a guess expects (1 - p)(q - (1 - q)) / 2 and the generic name
    p ((1 - q) - q) / 2; guesses among themselves cancel.
    """
    p, q = 0.3, 0.4
    gap = (1 - p) * (2 * q - 1) / 2 - p * (1 - 2 * q) / 2
    assert tabular.drift(p, q, 2, "dr_grpo") == pytest.approx(gap, abs=1e-12)
    logits = np.log([p, 1 - p, 1e-30])
    step = tabular.exact_gradient(logits, q, 2, "dr_grpo")
    np.testing.assert_allclose(step, [p * (1 - p) * gap, -p * (1 - p) * gap, 0], atol=1e-12)


@pytest.mark.parametrize("group_size", SIZES)
def test_the_loss_moves_as_the_drift_says(group_size):
    for algo, support in (("grpo", 1), ("dr_grpo", 2)):
        logits = np.log([0.2, 0.8, 1e-30])
        step = tabular.exact_gradient(logits, 0.35, group_size, algo, support)
        expected = 0.16 * tabular.drift(0.2, 0.35, group_size, algo, support)
        np.testing.assert_allclose(step, [expected, -expected, 0], atol=1e-12)


@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("hit_rate", [0.25, 0.35, 0.45])
def test_threshold_of_centred_advantages(group_size, hit_rate):
    """Dr.GRPO and RLOO move to guessing only above (1 - (q / (1 - q))^(1 / (N - 2))) / q.

    A guess that hits also takes the reward from its generic siblings, which the group's mean
    credits to it: the threshold is below the one of equal reward, and 0 from q = 1/2 on.
    """
    limit = tabular.centred_threshold(hit_rate, group_size)
    for algo in ("dr_grpo", "rloo"):
        for p in (*np.linspace(0.01, 0.99, 25), limit - 0.003, limit + 0.003):
            if 0 < p < 1:
                assert (tabular.drift(p, hit_rate, group_size, algo) > 0) == (p > limit)
        assert tabular.threshold(hit_rate, group_size, algo) == pytest.approx(
            min(limit, 1), abs=1e-5
        )
        assert tabular.threshold(0.5, group_size, algo) == 0
    assert limit < tabular.break_even(hit_rate, group_size) or limit > 1


@pytest.mark.parametrize("group_size", SIZES)
def test_equal_reward_is_another_threshold(group_size):
    """Above (1 - q^(1 / (N - 1))) / q a guess earns more: enumerated from the rewards alone."""
    q = 0.45
    limit = tabular.break_even(q, group_size)
    for p in (0.9 * limit, limit, min(1.1 * limit, 0.999)):
        counts = tabular.compositions(group_size, 3)
        outcomes = np.array([np.repeat(np.arange(4), row) for row in counts])
        rewards = tabular.reward.rewards("dynamic", tabular.OUTCOME_CODES[outcomes])
        chance = tabular.multinomial(counts, tabular.outcome_probs((p, 1 - p, 0.0), q))
        of_guess = chance @ np.where(outcomes < 2, rewards, 0).mean(1) / p
        of_generic = chance @ np.where(outcomes == 2, rewards, 0).mean(1) / (1 - p)
        assert of_guess == pytest.approx(q)
        assert of_generic == pytest.approx((1 - p * q) ** (group_size - 1))
        assert np.sign(round(of_guess - of_generic, 12)) == np.sign(round(p - limit, 12))
    # With a standard deviation or without, training guesses already where a guess earns less.
    for algo in ("grpo", "dr_grpo"):
        assert tabular.threshold(q, group_size, algo) < 0.8 * limit


def test_why_15_guess():
    """At q = 1/3 the threshold falls with N, so a policy that names 1 in 5 stays or leaves."""
    limits = [tabular.threshold(1 / 3, size) for size in SIZES]
    np.testing.assert_allclose(limits, [0.571, 0.206, 0.130], atol=2e-3)
    ends = [tabular.train(0.18, 1 / 3, size) for size in SIZES]
    assert ends[0] < 0.01
    assert ends[1] < 0.01
    assert ends[2] > 0.99


@pytest.mark.parametrize("group_size", SIZES)
def test_one_fixed_point_at_most_and_it_repels(group_size):
    """The drift changes its sign once, from down to up, or never."""
    for support in (1, 2, 0.3):
        for hit_rate in (0.2, 0.4, 0.7):
            chances = np.linspace(0.02, 0.98, 13)
            drifts = [tabular.drift(p, hit_rate, group_size, support=support) for p in chances]
            signs = np.sign(drifts)
            assert (np.diff(signs) >= 0).all()


@pytest.mark.parametrize("hit_rate", [1 / 3, 0.5, 0.8])
def test_support_raises_the_threshold(hit_rate):
    """N = 15: m = 2 to three times and more, .3 N further; at 1/3 it is never worth a guess."""
    one, two, share = (tabular.threshold(hit_rate, 15, support=m) for m in (1, 2, 0.3))
    assert two > max(3 * one, 0.03)
    assert share > 2 * two
    assert share < 1 or hit_rate < 0.4
    start = min((two + share) / 2, 0.9)
    assert tabular.train(start, hit_rate, 15, support=2) > 0.99
    assert tabular.train(start, hit_rate, 15, support=0.3) < 0.01


def test_share_makes_groups_of_any_size_alike():
    """m = .3 N at q = .6: N = 5, 10, 15 guess above .446, .384, .480; with m = 1 all always."""
    limits = [tabular.threshold(0.6, size, support=0.3) for size in SIZES]
    np.testing.assert_allclose(limits, [0.447, 0.385, 0.481], atol=2e-3)
    assert [tabular.threshold(0.6, size) for size in SIZES] == [0, 0, 0]


def test_figure_is_small(tmp_path):
    tabular.draw(tmp_path / "figure.svg", points=4)
    assert "hit rate q of a guess" in (tmp_path / "figure.svg").read_text()
    shipped = pathlib.Path(tabular.__file__).parents[2] / "docs" / "images" / "closed_form.svg"
    assert shipped.stat().st_size < 100_000


def test_a_silhouette_is_worth_a_guess_to_fifteen_siblings_only():
    """One species of six: never at N = 5 and 10; at N = 15 above .532."""
    limits = [tabular.threshold(1 / 6, size) for size in SIZES]
    np.testing.assert_allclose(limits, [1.0, 1.0, 0.532], atol=1e-3)
