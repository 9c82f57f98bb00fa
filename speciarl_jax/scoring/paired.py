"""Intervals of a difference of paired proportions: two policies on the same pictures.

Of n pictures, each answered once by either policy, `gained` are right only with the second and
`lost` only with the first; the difference of correctness is (gained - lost) / n. Where few pictures
change, resampling sees too few of them, or none, and its interval is too short. The score interval
asks instead which differences the counts do not contradict.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 0.95
_HALVINGS = 60  # of an interval of length 2: to the last bit of a double

Counts: TypeAlias = int | Int[np.ndarray, "*sets"]
Limits: TypeAlias = np.float64 | Float[np.ndarray, "*sets"]


@dataclasses.dataclass(frozen=True)
class Change:
    """Two answers to each picture of a data set.

    Attributes:
        gained: pictures right only with the second policy.
        lost: pictures right only with the first.
        images: all of them, at least 1.
    """

    gained: int
    lost: int
    images: int

    @property
    def difference(self) -> float:
        """Correctness of the second minus that of the first."""
        return (self.gained - self.lost) / self.images


def score_statistic(difference: Limits, gained: Counts, lost: Counts, images: Counts) -> Limits:
    """Standardised distance of the counts from a supposed difference d.

        T(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d)))

    with q the most likely share of lost pictures if d is true, the larger root of
    2n q^2 - (gained + lost - (2n - gained + lost) d) q - lost d (1 - d) = 0. Falls in d; about
    normal if d is true.

    Source: Tango (1998), Statistics in Medicine 17, 891-908.
    """
    spread = _spread(difference, gained, lost, images)
    distance = gained - lost - images * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic: Limits = np.where(distance == 0, 0.0, distance / spread)
    return statistic


def _spread(difference: Limits, gained: Counts, lost: Counts, images: Counts) -> Limits:
    """Standard deviation of gained - lost if `difference` is true."""
    a = 2 * images
    b = -gained - lost + (2 * images - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    spread: Limits = np.sqrt(np.maximum(images * (2 * q + difference * (1 - difference)), 0.0))
    return spread


def score_interval(gained: Counts, lost: Counts, images: Counts) -> tuple[Limits, Limits]:
    """95 % interval of the difference of two paired proportions: where |T(d)| <= 1.96.

    Also without a change it has a width: z^2 / (n + z^2) to either side.

    Args:
        gained: pictures right only with the second; one number or many.
        lost: pictures right only with the first.
        images: n of both, at least 1.

    Returns:
        (low, high) in [-1, 1].

    Source: Tango (1998), as `score_statistic`; solved by halving. scipy 1.17 has no interval for
    paired proportions; statsmodels has Newcombe's and Wald's in its development version only.
    """
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    estimate = np.asarray((gained - lost) / images, np.float64)

    def limit(end: float) -> Limits:
        """The root of |n (estimate - d)| = z spread(d) between the estimate and -1 or 1."""
        inside, outside = estimate, np.full_like(estimate, end)
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            distance = np.abs(gained - lost - images * middle)
            is_inside = distance <= z * _spread(middle, gained, lost, images)
            inside = np.where(is_inside, middle, inside)
            outside = np.where(is_inside, outside, middle)
        return inside[()]

    return limit(-1.0), limit(1.0)


def mean_interval(changes: Sequence[Change]) -> tuple[float, float]:
    """95 % interval of the unweighted mean difference over K independent data sets.

        low = m - sqrt(sum_k (d_k - low_k)^2) / K,    high = m + sqrt(sum_k (high_k - d_k)^2) / K

    with (low_k, high_k) the `score_interval` of data set k. Each distance stands for the spread
    near that limit, so the mean keeps the skew of its parts. One data set keeps its own interval.

    Args:
        changes: of K >= 1 data sets.

    Source: Newcombe (1998), Statistics in Medicine 17, 873-890, method 10's square-and-add; as
    MOVER, Zou and Donner (2008), Statistics in Medicine 27, 1693-1702.
    """
    mean = math.fsum(change.difference for change in changes) / len(changes)
    below, above = [], []
    for change in changes:
        low, high = score_interval(change.gained, change.lost, change.images)
        below.append(change.difference - float(low))
        above.append(float(high) - change.difference)
    return mean - math.hypot(*below) / len(changes), mean + math.hypot(*above) / len(changes)
