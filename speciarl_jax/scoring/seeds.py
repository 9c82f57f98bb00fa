"""Several runs that differ in their seed only: a mean with Student's t interval.

The bootstrap of one run resamples pictures; what another seed would have taught is not in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from speciarl_jax.scoring.results import Estimate

CONFIDENCE = 0.95


def mean_over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean of one number a seed, with a 95 % interval for the mean over all seeds.

        m +- t s / sqrt(n),   s with n - 1 in its divisor, t the .975 quantile of Student's t
                              with n - 1 degrees of freedom

    Args:
        values: the metric of each run; None where it is undefined.

    Returns:
        ``{"value", "low", "high"}``: all None if a value is, or if there is none; low and high
        None for a single seed, which says nothing of the others.

    Source: Student (1908).
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"value": None, "low": None, "high": None}
    mean = statistics.fmean(known)
    if len(known) < 2:
        return {"value": mean, "low": None, "high": None}
    quantile = float(stdtrit(len(known) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * statistics.stdev(known) / math.sqrt(len(known))
    return {"value": mean, "low": mean - half, "high": mean + half}
