"""Means over seeds by hand."""

import pytest

from speciarl_jax.scoring.seeds import mean_over_seeds


def test_by_hand():
    """Mean .88, squared deviations .0004 + 0 + .0004 over 2: s = .02; t(2) = 4.302653."""
    found = mean_over_seeds([0.86, 0.88, 0.90])
    half = 4.302653 * 0.02 / 3**0.5
    assert found == pytest.approx(
        {"value": 0.88, "low": 0.88 - half, "high": 0.88 + half}, rel=1e-6
    )


def test_five_seeds_by_hand():
    """Deviations -2 -1 0 1 2 hundredths: s = sqrt(.001 / 4); t(4) = 2.776445."""
    found = mean_over_seeds([0.8, 0.81, 0.82, 0.83, 0.84])
    assert found["high"] - found["value"] == pytest.approx(
        2.776445 * (0.00025 / 5) ** 0.5, rel=1e-6
    )


def test_what_says_nothing_has_no_interval():
    assert mean_over_seeds([0.5]) == {"value": 0.5, "low": None, "high": None}
    undefined = {"value": None, "low": None, "high": None}
    assert mean_over_seeds([]) == undefined
    assert mean_over_seeds([0.5, None]) == undefined


def test_equal_seeds_have_an_interval_of_width_zero():
    assert mean_over_seeds([0.5, 0.5, 0.5]) == {"value": 0.5, "low": 0.5, "high": 0.5}
