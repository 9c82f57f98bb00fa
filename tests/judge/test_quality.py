import asyncio
import collections

import pytest

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair, failure
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.pairs_file import read_pairs
from speciarl_jax.judge.parse import normalize
from speciarl_jax.judge.quality import SHIPPED_PAIRS, cohen_kappa, evaluate_file, measure
from speciarl_jax.judge.vote import VoteJudge, majority, make_judge
from speciarl_jax.types import Category, FailureKind, Verdict

W, A, G, L, S, M = Category


def test_kappa_by_hand():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = .7, p_e = .5, kappa = .4
    pairs = [(S, S)] * 20 + [(S, W)] * 5 + [(W, S)] * 10 + [(W, W)] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa(pairs, is_weighted=True) == pytest.approx(0.4)  # two labels: the same


def test_weighted_kappa_forgives_neighbours():
    near = [(S, M), (M, M), (W, W), (G, G), (L, L)]
    far = [(S, W), (M, M), (W, W), (G, G), (L, L)]
    assert cohen_kappa(near) == pytest.approx(cohen_kappa(far), abs=0.06)
    assert cohen_kappa(near, is_weighted=True) > cohen_kappa(far, is_weighted=True) + 0.3
    assert cohen_kappa([(S, S)] * 3) == 1.0


def test_measure_by_hand():
    items = [
        {"category": "specific", "domain": "birds"},
        {"category": "more_specific", "domain": "birds"},
        {"category": "generic", "domain": "cars"},
        {"category": "wrong", "domain": "cars"},
    ]
    outcomes = [Verdict(S, "m"), Verdict(S, "m"), Verdict(W, "m"), failure(FailureKind.TIMEOUT, "")]
    result = measure(items, outcomes)
    assert result.num_failed == 1
    assert result.agreement == pytest.approx(1 / 3)
    assert result.reward_agreement == 1.0
    assert result.confusion["more_specific"]["specific"] == 1
    assert result.by_group == {"domain/birds": 0.5, "domain/cars": 0.0}


def test_shipped_set_is_what_it_says():
    items = read_pairs(str(SHIPPED_PAIRS))
    assert len(items) >= 200
    domains = collections.Counter(item["domain"] for item in items)
    assert set(domains) == {"birds", "flowers", "food", "pets", "cars", "aircraft"}
    assert min(domains.values()) >= 30
    rungs = collections.Counter(Category.from_label(item["category"]) for item in items)
    assert min(rungs.values()) >= 12
    assert len(rungs) == 6
    tricks = {item["trick"] for item in items}
    assert tricks >= {"scientific_name", "synonym", "sibling", "product_line", "refusal"}
    assert tricks >= {"several_options", "typo", "injection", "homonym"}
    keys = {(normalize(i["ground_truth"]), normalize(i["answer"])) for i in items}
    assert len(keys) == len(items)
    assert all(normalize(item["answer"]) for item in items)


def test_eval_of_a_judge_that_knows_the_answers(fast_config, tmp_path):
    items = read_pairs(str(SHIPPED_PAIRS))
    truth = {(normalize(i["ground_truth"]), normalize(i["answer"])): i["category"] for i in items}

    class Oracle:
        def category(self, ground_truth, answer):
            return Category.from_label(truth[ground_truth, answer])

    async def run():
        async with serve(Oracle()) as url:
            config = fast_config(url)
            return await evaluate_file(config, out=str(tmp_path / "out.jsonl"))

    report = asyncio.run(run())
    assert report.num_pairs == len(items)
    assert report.kappa == report.agreement == report.weighted_kappa == 1.0
    assert report.prompt_tokens > report.completion_tokens > 0
    assert report.latency_s > 0
    assert "kappa 1.000" in report.to_text()
    assert (tmp_path / "out.jsonl").read_text().count("judged") == len(items)


def test_majority_by_hand():
    def vote(*rungs):
        return majority([Verdict(rung, "m") for rung in rungs])

    assert vote(S, S, W) == Verdict(S, "vote", is_cached=False)
    assert vote(S, W).category is W  # a tie goes down
    assert vote(S, M, L).category is L
    lost = failure(FailureKind.TIMEOUT, "late")
    assert majority([Verdict(S, "m"), Verdict(S, "m", is_cached=True), lost]).category is S
    assert majority([Verdict(S, "m"), lost]).kind is FailureKind.TIMEOUT
    assert majority([Verdict(S, "m", True), Verdict(S, "m", True)]).is_cached


def test_vote_over_models_and_prompts(fast_config, tmp_path):
    class Fixed:
        def __init__(self, rung):
            self.rung = rung

        def category(self, ground_truth, answer):
            return self.rung

    async def run():
        async with serve(Fixed(S)) as first, serve(Fixed(G)) as second:
            voters = (f"endpoints={first},model=a", f"endpoints={second},model=b",
                      f"endpoints={second},model=b,prompt=binary_v1")  # fmt: skip
            config = fast_config(first, voters=voters, cache_path=str(tmp_path / "c"))
            async with make_judge(config) as judge:
                assert isinstance(judge, VoteJudge)
                await judge.check_health(5.0)
                outcomes = await judge.label([Pair("owl", "bird")])
                return outcomes, judge.stats()

    outcomes, stats = asyncio.run(run())
    assert outcomes[0].judge == "vote"
    assert outcomes[0].category is W  # specific, generic, binary incorrect: a three-way tie
    assert stats["judge/requests"] == 3


def test_bad_votes(fast_config):
    with pytest.raises(JudgeError, match="two voters or more"):
        make_judge(fast_config("http://h/v1", voters=("model=a",)))
    with pytest.raises(ValueError, match="expected FIELD=VALUE"):
        make_judge(fast_config("http://h/v1", voters=("model=a", "colour=red")))
