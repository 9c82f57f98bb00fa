"""Metrics as functions of per-image sums, and their 95 % intervals (percentile bootstrap).

The unit is the image, never the rollout: samples of one image resemble each other, and
resampling them one by one would claim a precision that is not there.

The seed of the resampling is 0 wherever nobody asks for another, and never the run's: an interval
is then the same at the end of training, in ``metrics.json``, in the report and in `compare`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from speciarl_jax.scoring.predictions import RUNGS, Prediction
from speciarl_jax.scoring.results import Estimate, MainMetric, Metric

CONFIDENCE = 0.95
_CHUNK_CELLS = 4_000_000  # weights held at once, 32 MB of int64

FORMAT_RULES = ("wrong", "separate", "drop")
MAIN_METRICS: tuple[MainMetric, ...] = ("correctness", "specificity", "hm")
METRICS: tuple[Metric, ...] = (*MAIN_METRICS, "format_failure_rate", "judge_failure_rate")

_RUNG_SCORES = np.array([0, 0, 1, 2, 3, 4, 4]) / 4  # of `predictions.RUNGS` but the last
Numbers: TypeAlias = np.ndarray | np.float64  # one number, or one for each resample
_ROWS = 3  # column of the row count among the six moments, see `moments_of`


@dataclasses.dataclass(frozen=True)
class ScoringRule:
    """How rows become metrics.

    Attributes:
        format_failures: one of `FORMAT_RULES`; `scoring.metrics` says what they mean.
        bootstrap_samples: resamples of the images behind each interval.
        seed: of the resampling.

    Raises:
        ValueError: an unknown rule for format failures.
    """

    format_failures: str = "wrong"
    bootstrap_samples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the rule."""
        if self.format_failures not in FORMAT_RULES:
            known = ", ".join(FORMAT_RULES)
            raise ValueError(f"format_failures={self.format_failures!r}: expected one of {known}")


DEFAULT_RULE = ScoringRule()


def stratum_rng(seed: int, name: str) -> np.random.Generator:
    """A stream of its own per data set, so that adding a data set changes no other's interval."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def resample_sums(
    rows: Float[np.ndarray, "images columns"], samples: int, rng: np.random.Generator
) -> Float[np.ndarray, "samples columns"]:
    """Column sums of `samples` resamples of the rows, each as large as the original.

    Equal rows are interchangeable, so the draw is multinomial over the distinct rows: the same
    distribution as drawing images, and far cheaper where images have few distinct outcomes.

    Source: Efron (1979), own arrangement.
    """
    if len(rows) == 0:
        return np.zeros((samples, rows.shape[1]))
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    shares = counts / counts.sum()
    sums = np.empty((samples, rows.shape[1]))
    step = max(1, _CHUNK_CELLS // len(kinds))
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        weights = rng.multinomial(len(rows), shares, size=stop - start)
        sums[start:stop] = weights @ kinds
    return sums


def estimate(value: float, replicates: np.ndarray, images: int) -> Estimate:
    """``{"value", "low", "high"}`` with None for whatever is undefined.

    Resamples in which the metric is undefined are left out of the percentiles. One image says
    nothing about spread, so its interval is undefined, not of width zero.

    Args:
        value: the metric on the data itself; nan if undefined.
        replicates: [samples] the metric on each resample.
        images: number of images behind the value.
    """
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    finite = replicates[~np.isnan(replicates)]
    if images < 2 or finite.size == 0:
        return {"value": float(value), "low": None, "high": None}
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}


@dataclasses.dataclass
class Scored:
    """Metrics of one data set (or average) and of each resample of it."""

    values: dict[str, float]  # by metric, nan where undefined
    replicates: dict[str, np.ndarray]  # by metric, [samples]
    images: int  # of an average: of its smallest data set
    rows: int  # rollouts

    def estimates(self) -> dict[str, Estimate]:
        """Each metric with its interval, as in ``metrics.json``."""
        return {
            name: estimate(value, self.replicates[name], self.images)
            for name, value in self.values.items()
        }


def _hm(c: Numbers, s: Numbers) -> np.ndarray:
    """Harmonic mean; 0 where c is 0 (s is undefined there) or both are 0."""
    total = c + s
    with np.errstate(invalid="ignore", divide="ignore"):
        hm = np.where(total == 0, 0.0, 2 * c * s / total)
    return np.where(c == 0, 0.0, hm)


def _ratio(top: Numbers, bottom: Numbers) -> np.ndarray:
    """Quotient, nan where bottom is 0 (or a rounding error away from it)."""
    is_defined = bottom > 1e-9
    return np.where(is_defined, top / np.where(is_defined, bottom, 1.0), np.nan)


def metrics_of(moments: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of summed moments [..., 6], each of shape [...]."""
    scored, wrong, score, rows, format_failures, judge_failures = np.moveaxis(moments, -1, 0)
    correctness = _ratio(scored - wrong, scored)
    specificity = _ratio(score, scored - wrong)
    return {
        "correctness": correctness,
        "specificity": specificity,
        "hm": _hm(correctness, specificity),
        "format_failure_rate": _ratio(format_failures, rows),
        "judge_failure_rate": _ratio(judge_failures, rows),
    }


def rung_counts(images: Iterable[Sequence[Prediction]]) -> Float[np.ndarray, "I 8"]:
    """Rows of each image on each of `predictions.RUNGS`."""
    counts = [np.bincount([p.rung for p in rows], minlength=len(RUNGS)) for rows in images]
    return np.array(counts, float).reshape(-1, len(RUNGS))


def moments_of(
    rungs: Float[np.ndarray, "*rows 8"], rule: ScoringRule
) -> Float[np.ndarray, "*rows 6"]:
    """Sums from which every metric follows: linear in the rungs, so they can be added up.

    Args:
        rungs: rows (or their probability) on each of `predictions.RUNGS`.
        rule: what format failures count as.

    Returns:
        [..., 6]: scored, wrong, score, rows, format failures, judge failures.
    """
    format_failures, wrong, judge_failures = rungs[..., 0], rungs[..., 1], rungs[..., -1]
    labelled = rungs[..., 1:-1].sum(-1)
    is_scored = float(rule.format_failures != "drop")
    is_wrong = float(rule.format_failures == "wrong")
    return np.stack(
        [
            labelled + is_scored * format_failures,
            wrong + is_wrong * format_failures,
            rungs[..., :-1] @ _RUNG_SCORES,
            labelled + format_failures + judge_failures,
            format_failures,
            judge_failures,
        ],
        axis=-1,
    )


def resample(name: str, rungs: Float[np.ndarray, "I K 8"], rule: ScoringRule) -> list[Scored]:
    """Scores each of K variants of the images of data set `name`, resampled together."""
    moments = moments_of(rungs, rule)
    images, variants, columns = moments.shape
    rng, samples = stratum_rng(rule.seed, name), rule.bootstrap_samples
    sums = resample_sums(moments.reshape(images, variants * columns), samples, rng)
    sums = sums.reshape(samples, variants, columns)
    scored = []
    for k in range(variants):
        total = moments[:, k].sum(0)
        values = {name: float(v) for name, v in metrics_of(total).items()}
        scored.append(Scored(values, metrics_of(sums[:, k]), images, round(total[_ROWS])))
    return scored


def mean(members: Sequence[Scored]) -> Scored:
    """Unweighted mean over data sets, resample by resample."""
    return Scored(
        {m: float(np.mean([s.values[m] for s in members])) for m in members[0].values},
        {m: np.mean([s.replicates[m] for s in members], axis=0) for m in members[0].values},
        min(s.images for s in members),
        sum(s.rows for s in members),
    )


def average(members: Sequence[Scored]) -> Scored:
    """The mean over data sets, with the HM both ways."""
    scored = mean(members)
    values, replicates = scored.values, scored.replicates
    hm = _hm(np.float64(values["correctness"]), np.float64(values["specificity"]))
    values["hm_of_means"] = float(hm)
    replicates["hm_of_means"] = _hm(replicates["correctness"], replicates["specificity"])
    return scored
