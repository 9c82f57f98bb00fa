"""Text metrics of open-world classification that need no judge: a second opinion on a run.

    text inclusion        the ground truth occurs in the answer, word for word
    semantic similarity   cosine of the embeddings of truth and answer
    concept similarity    highest cosine of the truth and any run of 1 to 3 words of the answer

Similarities need an `Embedder`, which is not shipped, such as `sentence_model.SentenceModel`. A
format failure has cosine 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from speciarl_jax.judge.parse import normalize
from speciarl_jax.scoring import bootstrap
from speciarl_jax.scoring.predictions import Prediction
from speciarl_jax.scoring.results import TextMetric, TextMetrics, TextScores

_CONCEPT_WORDS = 3
_ANSWER_WORDS = 40  # of an answer that concepts are taken from; a label has two to five
METRICS: tuple[TextMetric, ...] = ("text_inclusion", "semantic_similarity", "concept_similarity")


@runtime_checkable
class Embedder(Protocol):
    """Texts to unit vectors."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, width] float32 of length 1; a row of zeros where a text has no embedding."""
        ...


def text_inclusion(ground_truth: str, answer: str) -> bool:
    """True if the truth stands in the answer as whole words, case aside.

    Source: text inclusion of Conti et al., "On Large Multimodal Models as Open-World Image
    Classifiers" (2025); whole words instead of characters, so that "ant" is not in "plant".
    """
    name = normalize(ground_truth)
    return bool(name) and f" {name} " in f" {normalize(answer)} "


def concepts(answer: str) -> list[str]:
    """Runs of 1 to 3 neighbouring words among the first 40 of an answer, normalised.

    Source: Conti et al. (2025) take the noun phrases of a parser; runs of words stand in for them.
    """
    words = normalize(answer).split()[:_ANSWER_WORDS]
    sizes = range(1, _CONCEPT_WORDS + 1)
    return [" ".join(words[i : i + n]) for n in sizes for i in range(len(words) - n + 1)]


def similarities(
    pairs: Sequence[tuple[str, str]], embedder: Embedder
) -> dict[tuple[str, str], tuple[float, float]]:
    """(semantic, concept) similarity of every distinct (ground truth, answer).

    Each distinct text is embedded once.
    """
    distinct = dict.fromkeys(pairs)
    spans = {answer: concepts(answer) for _, answer in distinct}
    texts = dict.fromkeys(
        text for truth, answer in distinct for text in (truth, answer, *spans[answer])
    )
    vectors = embedder.embed(list(texts))
    row = {text: i for i, text in enumerate(texts)}
    found = {}
    for truth, answer in distinct:
        places = [row[answer], *(row[span] for span in spans[answer])]
        cosines = vectors[places] @ vectors[row[truth]]
        found[truth, answer] = float(cosines[0]), float(cosines[1:].max(initial=0.0))
    return found


def score_text(
    predictions: Sequence[Prediction],
    embedder: Embedder | None = None,
    bootstrap_samples: int = 2000,
) -> TextMetrics:
    """Mean text metrics with 95 % intervals over images, per data set and over data sets.

    Args:
        predictions: rows, of whatever data sets; images weigh by their number of rows.
        embedder: similarities are left out if None.
        bootstrap_samples: see `bootstrap.ScoringRule`.

    Returns:
        ``{"datasets": {name: scores}, "averages": {"all": scores}}``; scores hold
        text_inclusion and, with an embedder, semantic_similarity and concept_similarity as
        ``{"value", "low", "high"}``, and n rows. The average is unweighted over data sets.
    """
    answered = [(p.ground_truth, p.prediction) for p in predictions if p.prediction is not None]
    cosines = similarities(answered, embedder) if embedder is not None else None
    metrics = METRICS if embedder is not None else METRICS[:1]
    sums: dict[str, dict[str, np.ndarray]] = {}
    for p in predictions:
        row = sums.setdefault(p.dataset, {}).setdefault(p.prompt_id, np.zeros(1 + len(metrics)))
        row[0] += 1
        if p.prediction is None:
            continue
        row[1] += text_inclusion(p.ground_truth, p.prediction)
        if cosines is not None:
            row[2:] += cosines[p.ground_truth, p.prediction]
    scored = {
        name: _resampled(name, np.array(list(images.values())), metrics, bootstrap_samples)
        for name, images in sums.items()
    }
    members = list(scored.values())
    return {
        "datasets": {name: _scores(s) for name, s in scored.items()},
        "averages": {"all": _scores(bootstrap.mean(members))} if members else {},
    }


def _resampled(
    name: str, moments: np.ndarray, metrics: Sequence[str], samples: int
) -> bootstrap.Scored:
    rng = bootstrap.stratum_rng(bootstrap.ScoringRule.seed, f"text {name}")
    resampled = bootstrap.resample_sums(moments, samples, rng)
    total = moments.sum(0)
    return bootstrap.Scored(
        {m: float(total[i] / total[0]) for i, m in enumerate(metrics, start=1)},
        {m: resampled[:, i] / resampled[:, 0] for i, m in enumerate(metrics, start=1)},
        len(moments),
        int(total[0]),
    )


def _scores(scored: bootstrap.Scored) -> TextScores:
    return cast(TextScores, {**scored.estimates(), "n": scored.rows})
