"""The content of ``metrics.json`` and of comparisons, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypeAlias, TypedDict

from speciarl_jax.types import JsonValue

MainMetric: TypeAlias = Literal["correctness", "specificity", "hm"]
Metric: TypeAlias = Literal[
    "correctness", "specificity", "hm", "format_failure_rate", "judge_failure_rate"
]
TextMetric: TypeAlias = Literal["text_inclusion", "semantic_similarity", "concept_similarity"]
Estimate: TypeAlias = dict[str, float | None]  # value, low, high; None where undefined


class MainEstimates(TypedDict):
    """The paper's three metrics."""

    correctness: Estimate
    specificity: Estimate
    hm: Estimate


class Scores(MainEstimates):
    """An entry of ``datasets`` or ``averages`` in ``metrics.json``."""

    n: int
    format_failure_rate: Estimate
    judge_failure_rate: Estimate
    hm_of_means: NotRequired[Estimate]  # averages
    datasets: NotRequired[list[str]]  # averages
    n_images: NotRequired[int]
    category_fracs: NotRequired[dict[str, float]]
    completion_words: NotRequired[float | None]


class CurvePoint(MainEstimates):
    """What the best of k answers would score."""

    k: int
    format_failure_rate: Estimate
    hm_of_means: NotRequired[Estimate]
    images_short: NotRequired[int]


class BestOf(TypedDict):
    """Best of k on one data set: the most samples of an image, their best, the curve."""

    n: int
    best: Scores
    curve: list[CurvePoint]


class BestOfs(TypedDict):
    """``best_of`` in ``metrics.json``."""

    datasets: dict[str, BestOf]
    averages: dict[str, list[CurvePoint]]


class MetricsSettings(TypedDict):
    """``settings`` in ``metrics.json``: a `bootstrap.ScoringRule` and what is averaged."""

    format_failures: str
    bootstrap_samples: int
    seed: int
    confidence: float
    in_domain: list[str]


class TextScores(TypedDict):
    """Text metrics of one data set or average."""

    text_inclusion: Estimate
    semantic_similarity: NotRequired[Estimate]
    concept_similarity: NotRequired[Estimate]
    n: int


class TextMetrics(TypedDict):
    """``text`` in ``metrics.json``."""

    datasets: dict[str, TextScores]
    averages: dict[str, TextScores]


class Evaluation(TypedDict):
    """The content of ``metrics.json``."""

    datasets: dict[str, Scores]
    averages: dict[str, Scores]
    settings: MetricsSettings
    best_of: NotRequired[BestOfs]
    text: NotRequired[TextMetrics]


_MAIN = ("correctness", "specificity", "hm")
_RATES = ("format_failure_rate", "judge_failure_rate", "hm_of_means")


def check_scores(content: Mapping[str, JsonValue]) -> None:
    """Refuses a ``metrics.json`` whose scores are not of the form of `Scores`.

    Raises:
        ValueError: names the entry and what it should be.
    """
    for part in ("datasets", "averages"):
        entries = content.get(part)
        if not isinstance(entries, dict):
            raise ValueError(f"{part}: expected an object, got {type(entries).__name__}")
        for name, scores in entries.items():
            where = f"{part}/{name}"
            if not isinstance(scores, dict):
                raise ValueError(f"{where}: expected an object, got {type(scores).__name__}")
            if not isinstance(scores.get("n"), int):
                raise ValueError(f"{where}/n: expected a number of answers")
            for metric in (*_MAIN, *(rate for rate in _RATES if rate in scores)):
                _check_estimate(f"{where}/{metric}", scores.get(metric))


def _check_estimate(where: str, estimate: JsonValue) -> None:
    if not isinstance(estimate, dict) or "value" not in estimate:
        raise ValueError(f"{where}: expected an object with value, low and high")
    for name in ("value", "low", "high"):
        number = estimate.get(name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{where}/{name}={number!r}: expected a number or null")


class Difference(MainEstimates):
    """The metrics of one evaluation minus those of another on the same images."""

    format_failure_rate: Estimate
    judge_failure_rate: Estimate
    hm_of_means: Estimate
    n_images: int
    correctness_interval: Literal["score", "bootstrap"]
    discordant: int | None  # images wrong on one side only; None with the bootstrap's interval


class Comparison(TypedDict):
    """Two evaluations on the data sets both have, and b minus a."""

    a: Evaluation
    b: Evaluation
    differences: dict[str, Difference]  # by data set and ``mean <average>``
    left_out: list[str]  # data sets that only one has
