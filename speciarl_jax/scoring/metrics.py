"""The paper's metrics on judged answers, with 95 % bootstrap intervals over images.

    correctness  c = 1 - wrong / N                      abstaining is not wrong
    specificity  s = mean of score / 4 over answers that are not wrong
                     (abstain 1, generic 2, less_specific 3, specific and more_specific 4)
    HM           2 s c / (s + c)

Where everything is wrong, c = 0, s is undefined (null in files) and HM is 0. Where nothing was
scored, all three are undefined. Undefined values stay undefined in averages: no mean is taken
over fewer data sets than its name says.

Rows without a label (judge failures) are left out of N and counted in `judge_failure_rate`.
Format failures follow one of three rules (`bootstrap.FORMAT_RULES`):

    wrong     a wrong answer (default)
    separate  a rung of its own below abstain: in N, not wrong, score 0
    drop      left out of N
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
from jaxtyping import Float, Shaped

from speciarl_jax.scoring import bootstrap, paired
from speciarl_jax.scoring.bootstrap import DEFAULT_RULE, ScoringRule
from speciarl_jax.scoring.predictions import RUNGS, Prediction
from speciarl_jax.scoring.results import (
    BestOf,
    BestOfs,
    CurvePoint,
    Difference,
    Evaluation,
    Scores,
)
from speciarl_jax.types import JsonObject

# Names in lower case without punctuation, see `_canonical`.
FINE_GRAINED = frozenset(
    {"flowers", "flowers102", "oxfordflowers102", "food", "food101", "pets", "oxfordpets",
     "oxfordiiitpet"}
)  # fmt: skip
VERY_FINE_GRAINED = frozenset({"cars", "cars196", "stanfordcars", "aircraft", "fgvcaircraft"})


def _by_image(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    images: dict[str, list[Prediction]] = {}
    for p in predictions:
        images.setdefault(p.prompt_id, []).append(p)
    return images


def by_dataset(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Rows of each data set, in order of first appearance."""
    datasets: dict[str, list[Prediction]] = {}
    for p in predictions:
        datasets.setdefault(p.dataset, []).append(p)
    return datasets


def _score_plain(
    name: str, predictions: Sequence[Prediction], rule: ScoringRule
) -> bootstrap.Scored:
    counts = bootstrap.rung_counts(_by_image(predictions).values())
    return bootstrap.resample(name, counts[:, None], rule)[0]


def _scores(scored: bootstrap.Scored, others: JsonObject) -> Scores:
    """The estimates by name and what else is known, in one object."""
    return cast(Scores, {**scored.estimates(), **others})


def _describe(predictions: Sequence[Prediction]) -> JsonObject:
    """Shares that sum to 1 over all rows, failures included, and the mean answer length."""
    totals = bootstrap.rung_counts([predictions])[0]
    rows = max(len(predictions), 1)
    words = sum(len(p.completion.split()) for p in predictions)
    return {
        "n": len(predictions),
        "n_images": len({p.prompt_id for p in predictions}),
        "category_fracs": {n: float(t / rows) for n, t in zip(RUNGS, totals, strict=True)},
        "completion_words": words / rows if predictions else None,
    }


def _one_dataset(predictions: Sequence[Prediction]) -> str:
    names = sorted({p.dataset for p in predictions})
    if len(names) > 1:
        raise ValueError(f"expected rows of one data set, got {', '.join(names)}: use metrics_json")
    return names[0] if names else ""


def score_dataset(predictions: Sequence[Prediction], rule: ScoringRule = DEFAULT_RULE) -> Scores:
    """Scores the rows of one data set, one or more per image.

    Returns:
        correctness, specificity, hm, format_failure_rate, judge_failure_rate as ``{"value",
        "low", "high"}`` (None where undefined; low and high None for fewer than two images);
        n rows, n_images, category_fracs over all rows (failures included, sum 1) and
        completion_words (mean length of a completion).

    Raises:
        ValueError: rows of several data sets.

    Source: SpeciaRL (arXiv 2603.03197), evaluation section; intervals and rules own.
    """
    name = _one_dataset(predictions)
    return _scores(_score_plain(name, predictions, rule), _describe(predictions))


def _canonical(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _groups(names: list[str], in_domain: Collection[str]) -> dict[str, list[str]]:
    groups = {
        "in_domain": [n for n in names if n in in_domain],
        "out_of_domain": [n for n in names if n not in in_domain],
        "fine_grained": [n for n in names if _canonical(n) in FINE_GRAINED],
        "very_fine_grained": [n for n in names if _canonical(n) in VERY_FINE_GRAINED],
        "all": names,
    }
    return {group: members for group, members in groups.items() if members}


def _averages(
    scored: Mapping[str, bootstrap.Scored], groups: Mapping[str, list[str]]
) -> dict[str, Scores]:
    result = {}
    for group, names in groups.items():
        average = bootstrap.average([scored[n] for n in names])
        result[group] = _scores(average, {"n": average.rows, "datasets": names})
    return result


def metrics_json(
    predictions: Iterable[Prediction],
    in_domain: Collection[str] = (),
    rule: ScoringRule = DEFAULT_RULE,
) -> Evaluation:
    """The content of ``metrics.json``: every data set, the averages, and how it was computed.

    Where images have several rows, ``best_of`` holds `best_of_n` per data set and the averaged
    curves. Holds no nan: it can be dumped with ``allow_nan=False``.

    ``averages`` holds, for in_domain, out_of_domain, fine_grained, very_fine_grained and all,
    unweighted means over data sets of what `score_dataset` gives (hm is the mean of the HMs),
    hm_of_means beside them, n and the names; a group without members is left out. Intervals
    resample the images of every data set independently and average per resample.

    Args:
        predictions: rows, of whatever data sets.
        in_domain: names averaged as ``in_domain``; the others are ``out_of_domain``.
        rule: how rows become metrics.
    """
    datasets = by_dataset(predictions)
    groups = _groups(list(datasets), in_domain)
    scored = {name: _score_plain(name, rows, rule) for name, rows in datasets.items()}
    result: Evaluation = {
        "datasets": {n: _scores(scored[n], _describe(rows)) for n, rows in datasets.items()},
        "averages": _averages(scored, groups),
        "settings": {
            "format_failures": rule.format_failures,
            "bootstrap_samples": rule.bootstrap_samples,
            "seed": rule.seed,
            "confidence": bootstrap.CONFIDENCE,
            "in_domain": sorted(in_domain),
        },
    }
    if any(len(rows) > len(_by_image(rows)) for rows in datasets.values()):
        result["best_of"] = _best_of_json(datasets, groups, rule)
    return result


def best_predictions(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Each image's best row: highest category, ties to the lowest sample index.

    A format failure stands below every category; a judge failure is taken only where an image has
    nothing else.
    """

    def rank(p: Prediction) -> tuple[int, int]:
        return -1 if p.is_judge_failure else p.rung, -p.sample_index

    rows = by_dataset(predictions).values()
    return [max(group, key=rank) for data in rows for group in _by_image(data).values()]


@functools.lru_cache(maxsize=100_000)
def _all_below(m: int, n: int, k: int) -> float:
    """Probability that k draws without replacement from n all lie among m given ones."""
    return math.comb(m, k) / math.comb(n, k)


def best_of_k_rungs(counts: Shaped[np.ndarray, "I 7"], k: int) -> Float[np.ndarray, "I 7"]:
    """Distribution of the best rung of k of an image's samples, unbiased for k fresh samples.

    P(best <= c) = C(n_{<=c}, k) / C(n, k). An image with fewer than k samples enters with all of
    its own; one without any has no mass.

    Args:
        counts: [I, 7] samples of each image on each rung, worst first.
        k: group size.

    Returns:
        [I, 7] probabilities.

    Source: the pass@k estimator of Chen et al. (2021), applied to an ordered outcome.
    """
    kinds, places = np.unique(counts.astype(int), axis=0, return_inverse=True)
    below = np.zeros((len(kinds), counts.shape[1] + 1))
    for i, kind in enumerate(kinds.tolist()):
        n = sum(kind)
        if n:
            steps = itertools.accumulate(kind)
            below[i, 1:] = [_all_below(m, n, min(k, n)) for m in steps]
    return np.diff(below, axis=1)[places.reshape(-1)]


def curve_sizes(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({*(2**i for i in range(n.bit_length())), n} - {0})


def _curve(
    name: str, counts: Float[np.ndarray, "I 8"], ks: Sequence[int], rule: ScoringRule
) -> list[bootstrap.Scored]:
    labelled = counts[counts[:, :7].sum(1) > 0, :7]
    best = np.stack([best_of_k_rungs(labelled, k) for k in ks], axis=1)
    none_failed = np.zeros((*best.shape[:2], 1))
    return bootstrap.resample(name, np.concatenate([best, none_failed], axis=2), rule)


def best_of_n(predictions: Sequence[Prediction], rule: ScoringRule = DEFAULT_RULE) -> BestOf:
    """What an oracle that picks the best of k answers would score, for k = 1, 2, 4, ... N.

    Returns:
        n: largest number of samples of an image; best: `score_dataset` of the best rows; curve: one
        object per k with k, the three metrics, format_failure_rate and images_short (images
        that had fewer than k labelled samples and entered with all they had).

    Raises:
        ValueError: rows of several data sets.
    """
    name = _one_dataset(predictions)
    images = _by_image(predictions)
    ks = curve_sizes(max(map(len, images.values()), default=0))
    counts = bootstrap.rung_counts(images.values())
    curve = _curve(name, counts, ks, rule) if ks else []
    samples = counts[:, :7].sum(1)
    return {
        "n": ks[-1] if ks else 0,
        "best": score_dataset(best_predictions(predictions), rule),
        "curve": [
            _curve_point(k, point) | {"images_short": int((samples < k).sum())}
            for k, point in zip(ks, curve, strict=True)
        ],
    }


def _curve_point(k: int, point: bootstrap.Scored) -> CurvePoint:
    estimates = point.estimates()
    del estimates["judge_failure_rate"]
    return cast(CurvePoint, {"k": k, **estimates})


def _best_of_json(
    datasets: Mapping[str, list[Prediction]],
    groups: Mapping[str, list[str]],
    rule: ScoringRule,
) -> BestOfs:
    counts = {n: bootstrap.rung_counts(_by_image(rows).values()) for n, rows in datasets.items()}
    sizes = {n: int(c.sum(1).max()) for n, c in counts.items()}
    average: dict[str, list[CurvePoint]] = {}
    for group, names in groups.items():
        ks = curve_sizes(min(sizes[n] for n in names))
        curves = [_curve(n, counts[n], ks, rule) for n in names]
        points = [bootstrap.average(list(members)) for members in zip(*curves, strict=True)]
        average[group] = [_curve_point(k, p) for k, p in zip(ks, points, strict=True)]
    return {
        "datasets": {n: best_of_n(rows, rule) for n, rows in datasets.items()},
        "averages": average,
    }


def paired_differences(
    preds_a: Iterable[Prediction],
    preds_b: Iterable[Prediction],
    rule: ScoringRule = DEFAULT_RULE,
) -> Difference:
    """Evaluation of b minus those of a, on the images both have, resampled together.

    Several data sets are averaged without weights, as in `averages`.

    Where each image has one scored answer on either side, correctness is a difference of paired
    proportions and has Tango's score interval, over several data sets `paired.mean_interval` of
    theirs. With several samples of an image, missing labels, or format failures dropped it is none,
    and has the bootstrap's like the other metrics.

    Returns:
        Each metric (and hm_of_means) as ``{"value", "low", "high"}``, n_images,
        ``correctness_interval`` (score or bootstrap) and ``discordant``: images that are wrong on
        one side only, None where the interval is not the score's.

    Raises:
        ValueError: no common image.
    """
    datasets_a, datasets_b = by_dataset(preds_a), by_dataset(preds_b)
    pairs: list[list[bootstrap.Scored]] = []
    changes: list[paired.Change | None] = []
    for name in [n for n in datasets_a if n in datasets_b]:
        a, b = _by_image(datasets_a[name]), _by_image(datasets_b[name])
        shared = [i for i in a if i in b]
        if not shared:
            continue
        counts = np.stack(
            [bootstrap.rung_counts(side[i] for i in shared) for side in (a, b)], axis=1
        )
        pairs.append(bootstrap.resample(name, counts, rule))
        changes.append(_change(bootstrap.moments_of(counts, rule)))
    if not pairs:
        raise ValueError("the two runs have no image in common: evaluate them on the same data")
    mean_a, mean_b = (bootstrap.average(side) for side in zip(*pairs, strict=True))
    difference = dataclasses.replace(
        mean_b,
        values={m: v - mean_a.values[m] for m, v in mean_b.values.items()},
        replicates={m: v - mean_a.replicates[m] for m, v in mean_b.replicates.items()},
    )
    estimates = difference.estimates()
    known = [change for change in changes if change is not None]
    is_proportion = len(known) == len(changes)
    if is_proportion and estimates["correctness"]["low"] is not None:
        low, high = paired.mean_interval(known)
        estimates["correctness"] |= {"low": low, "high": high}
    others = {
        "n_images": sum(first.images for first, _ in pairs),
        "correctness_interval": "score" if is_proportion else "bootstrap",
        "discordant": sum(c.gained + c.lost for c in known) if is_proportion else None,
    }
    return cast(Difference, {**estimates, **others})


def _change(moments: Float[np.ndarray, "I 2 6"]) -> paired.Change | None:
    """What became right and wrong; None unless each image has one scored answer on either side."""
    scored, wrong = moments[..., 0], moments[..., 1]
    if not (scored == 1).all():
        return None
    gain = wrong[:, 0] - wrong[:, 1]
    return paired.Change(int((gain > 0).sum()), int((gain < 0).sum()), len(moments))
