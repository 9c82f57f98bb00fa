"""Intervals of paired proportions: published examples, the test inverted, coverage."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from speciarl_jax.scoring.bootstrap import ScoringRule, resample_sums
from speciarl_jax.scoring.metrics import paired_differences
from speciarl_jax.scoring.paired import Change, mean_interval, score_interval, score_statistic
from speciarl_jax.scoring.predictions import Prediction
from speciarl_jax.types import Category

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33, 2850-2875: airway
        # hyper-responsiveness of 21 children, complete response of 161 patients.
        ((1, 7, 21), (-0.517, -0.026)),
        ((6, 16, 161), (-0.124, -0.005)),
    ],
)
def test_published_examples(counts, expected):
    np.testing.assert_allclose(score_interval(*counts), expected, atol=5e-4)


@pytest.mark.parametrize("images", [1, 40, 720])
def test_without_a_change_by_hand(images):
    """q = max(0, -d), so n^2 d^2 = z^2 n d (1 - d): d = z^2 / (n + z^2)."""
    edge = Z**2 / (images + Z**2)
    np.testing.assert_allclose(score_interval(0, 0, images), (-edge, edge), rtol=1e-12)


@pytest.mark.parametrize("counts", [(5, 2, 60), (2, 5, 60), (0, 7, 240), (9, 0, 9), (31, 30, 720)])
def test_limits_invert_the_score_test(counts):
    """Against the likelihood's maximum under p_gained - p_lost = d, found by search."""
    gained, lost, images = counts

    def statistic(d):
        def minus_loglik(q):
            shares = np.array([q + d, q, 1 - 2 * q - d])
            seen = np.array([gained, lost, images - gained - lost])
            return -np.sum(seen[seen > 0] * np.log(np.maximum(shares[seen > 0], 1e-300)))

        bounds = (max(0.0, -d), (1 - d) / 2)
        q = minimize_scalar(minus_loglik, bounds=bounds, method="bounded", options={"xatol": 1e-13})
        return (gained - lost - images * d) / np.sqrt(images * (2 * q.x + d - d * d))

    low, high = score_interval(*counts)
    assert -1 <= low < (gained - lost) / images <= high <= 1
    for limit, value in ((low, Z), (high, -Z)):
        if abs(limit) < 1:
            assert statistic(limit) == pytest.approx(value, abs=2e-4)
            assert score_statistic(limit, *counts) == pytest.approx(value, abs=1e-6)
    for inside in np.linspace(low, high, 7)[1:-1]:
        assert abs(score_statistic(inside, *counts)) < Z


def test_sides_mirror_and_an_estimate_is_inside():
    gained, lost = (x.reshape(-1) for x in np.meshgrid(np.arange(8), np.arange(8)))
    images = np.full(64, 20)
    low, high = score_interval(gained, lost, images)
    other_low, other_high = score_interval(lost, gained, images)
    np.testing.assert_allclose(low, -other_high, atol=1e-12)
    np.testing.assert_allclose(high, -other_low, atol=1e-12)
    assert (low < (gained - lost) / 20).all()
    assert ((gained - lost) / 20 < high).all()


def test_mean_over_data_sets_by_hand():
    one, other = Change(5, 2, 60), Change(0, 4, 100)
    assert mean_interval([one]) == pytest.approx(score_interval(5, 2, 60), abs=1e-15)
    (l1, h1), (l2, h2) = score_interval(5, 2, 60), score_interval(0, 4, 100)
    mean = (0.05 - 0.04) / 2
    below = np.sqrt((0.05 - l1) ** 2 + (-0.04 - l2) ** 2) / 2
    above = np.sqrt((h1 - 0.05) ** 2 + (h2 + 0.04) ** 2) / 2
    assert mean_interval([one, other]) == pytest.approx((mean - below, mean + above), abs=1e-12)


# --- coverage --------------------------------------------------------------------------------


def draw(rng, runs, images, discordant, share_gained):
    """[runs] gained and lost of `images` pictures, `discordant` of which change on average."""
    shares = [discordant * share_gained, discordant * (1 - share_gained), 1 - discordant]
    counts = rng.multinomial(images, shares, size=runs)
    return counts[:, 0], counts[:, 1], discordant * (2 * share_gained - 1)


def score_coverage(rng, runs, images, discordant, share_gained, num_sets=1):
    """Share of `runs` whose interval of the mean over data sets holds the truth."""
    mean, below, above = (np.zeros(runs) for _ in range(3))
    for _ in range(num_sets):
        gained, lost, truth = draw(rng, runs, images, discordant, share_gained)
        kinds, place = np.unique(np.stack([gained, lost], 1), axis=0, return_inverse=True)
        limits = score_interval(kinds[:, 0], kinds[:, 1], np.full(len(kinds), images))
        low, high = (limit[place] for limit in limits)
        difference = (gained - lost) / images
        mean += difference / num_sets
        below += (difference - low) ** 2
        above += (high - difference) ** 2
    low, high = mean - np.sqrt(below) / num_sets, mean + np.sqrt(above) / num_sets
    return np.mean((low <= truth) & (truth <= high))


def bootstrap_coverage(rng, runs, images, discordant, share_gained):
    """The same of the percentile bootstrap, which had this task before."""
    hits = 0
    for gained, lost in zip(*draw(rng, runs, images, discordant, share_gained)[:2], strict=True):
        rows = np.repeat([[1.0], [-1.0], [0.0]], [gained, lost, images - gained - lost], axis=0)
        low, high = np.percentile(resample_sums(rows, 400, rng) / images, [2.5, 97.5])
        hits += low <= discordant * (2 * share_gained - 1) <= high
    return hits / runs


SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of changed pictures that become right
# Counts are whole numbers, so exact coverage swings about .95; this is its lowest.
DIP = {(240, 0.03, 0.7): 0.9378}


def exact_coverage(images, discordant, share_gained):
    """Probability of all counts whose interval holds the truth."""
    most = int(images * discordant + 8 * np.sqrt(images * discordant) + 8)
    gained, lost = (x.reshape(-1) for x in np.meshgrid(np.arange(most), np.arange(most)))
    low, high = score_interval(gained, lost, np.full(len(gained), images))
    truth = discordant * (2 * share_gained - 1)
    chance = binom.pmf(gained + lost, images, discordant)
    chance = chance * binom.pmf(gained, gained + lost, share_gained)
    assert chance.sum() == pytest.approx(1, abs=1e-6)
    return chance[(low <= truth) & (truth <= high)].sum()


@pytest.mark.parametrize("images", [240, 720])
@pytest.mark.parametrize("discordant", [0.01, 0.03, 0.1])
def test_score_interval_covers(images, discordant):
    """Exactly, by enumeration: at least .94 in 35 of 36 cases, .9378 in the other."""
    found = [exact_coverage(images, discordant, share) for share in SHARES]
    for share, coverage in zip(SHARES, found, strict=True):
        assert coverage >= DIP.get((images, discordant, share), 0.94), (share, coverage)
    assert np.mean(found) >= 0.947


@pytest.mark.parametrize("images", [240, 720])
def test_interval_of_a_mean_covers(images):
    """Three data sets, 10,000 draws, standard error .0022: .936 is two below .94."""
    rng = np.random.default_rng(images)
    for discordant in (0.01, 0.03, 0.1):
        for share in (0.5, 0.7, 1.0):
            found = score_coverage(rng, 10_000, images, discordant, share, num_sets=3)
            assert 0.936 <= found <= 0.995, (discordant, share, found)


def test_the_bootstrap_does_not_cover():
    """One picture in a hundred changes, of 240: it misses in more than 8 of 100."""
    found = bootstrap_coverage(np.random.default_rng(0), 600, 240, 0.01, 1.0)
    assert found < 0.92


@pytest.mark.slow
def test_coverage_long():
    """Simulated: the score's at least .937 and .945 in the mean, the bootstrap's far below."""
    rng = np.random.default_rng(2)
    for images in (240, 720):
        for discordant in (0.01, 0.03, 0.1):
            cells = [
                score_coverage(rng, 40_000, images, discordant, share, sets)
                for share in SHARES
                for sets in (1, 3)
            ]
            old = [bootstrap_coverage(rng, 2000, images, discordant, s) for s in (0.5, 0.7, 1.0)]
            print(f"{images} pictures, {discordant:.0%} changed: score {min(cells):.3f} to "
                  f"{max(cells):.3f}, bootstrap", *(f"{x:.3f}" for x in old))  # fmt: skip
            assert min(cells) >= 0.935
            assert np.mean(cells) >= 0.945
            assert discordant > 0.01 or min(old) < 0.93


# --- in the comparison -----------------------------------------------------------------------


def rows(letters, dataset="birds", samples=1):
    """One picture a letter: w wrong, s specific, F format failure, J no label."""
    codes = {"w": Category.WRONG, "s": Category.SPECIFIC}
    return [
        Prediction(f"{dataset}/{i}", dataset, "", "finch", "", None if letter == "F" else "finch",
                   codes.get(letter), None, j)
        for i, letter in enumerate(letters)
        for j in range(samples)
    ]  # fmt: skip


def test_correctness_of_single_answers_has_the_score_interval():
    first, second = "w" * 5 + "s" * 35, "s" * 3 + "w" * 2 + "s" * 34 + "w"
    found = paired_differences(rows(first), rows(second))
    assert found["correctness"]["value"] == pytest.approx(2 / 40)
    limits = score_interval(3, 1, 40)
    assert (found["correctness"]["low"], found["correctness"]["high"]) == pytest.approx(limits)
    assert (found["correctness_interval"], found["discordant"]) == ("score", 4)
    same = paired_differences(rows(first), rows(first))
    assert same["discordant"] == 0
    assert same["correctness"]["high"] == pytest.approx(Z**2 / (40 + Z**2))
    assert same["hm"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_means_over_data_sets_combine_the_score_intervals():
    first = rows("wwss" * 5) + rows("ws" * 15, "dogs")
    second = rows("swss" * 5) + rows("ww" * 2 + "ws" * 13, "dogs")
    found = paired_differences(first, second)
    limits = mean_interval([Change(5, 0, 20), Change(0, 2, 30)])
    assert (found["correctness"]["low"], found["correctness"]["high"]) == pytest.approx(limits)
    assert found["discordant"] == 7


@pytest.mark.parametrize(
    ("second", "rule", "kind"),
    [
        ("swsF", "wrong", "score"),
        ("swsF", "separate", "score"),
        ("swsF", "drop", "bootstrap"),
        ("swsJ", "wrong", "bootstrap"),
    ],
)
def test_what_is_no_proportion_keeps_the_bootstrap(second, rule, kind):
    found = paired_differences(rows("wsss" * 10), rows(second * 10), ScoringRule(rule))
    assert found["correctness_interval"] == kind
    assert (found["discordant"] is None) == (kind == "bootstrap")
    several = paired_differences(rows("wsss", samples=2), rows("swss", samples=2))
    assert (several["correctness_interval"], several["discordant"]) == ("bootstrap", None)
