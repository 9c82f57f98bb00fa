import asyncio
import collections
import itertools
import json

import pytest
from aiohttp import web

from speciarl_jax.judge.base import JudgeDownError, Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.parse import fold, normalize
from speciarl_jax.types import Category, Failure, FailureKind, Verdict
from tests.support.raw_server import pair_of, raw_server, reply


def test_order_is_kept_and_equal_pairs_are_asked_once(number_judge, fast_config, pairs_of, expect):
    async def run():
        async with serve(number_judge) as url, JudgeClient(fast_config(url)) as judge:
            pairs = [*pairs_of(50), Pair("Some  TRUTH!", "Name 7."), *pairs_of(50)]
            first = await judge.label(pairs)
            again = await judge.label(pairs)
            return pairs, first, again, judge.stats()

    pairs, first, again, stats = asyncio.run(run())
    assert [v.category for v in first] == [expect(p.answer.strip(".")) for p in pairs]
    assert [v.is_cached for v in first] == [False] * 50 + [True] * 51
    assert all(v.is_cached for v in again)
    assert {v.judge for v in first} == {"scripted"}
    assert stats["judge/requests"] == 50
    assert stats["judge/labels"] == 202
    assert stats["judge/cache_hit_frac"] == pytest.approx(152 / 202)


def test_same_pair_in_flight_is_asked_once(fast_config):
    asked = []

    async def handler(request):
        asked.append(pair_of(await request.json()))
        await asyncio.sleep(0.1)
        return reply("generic")

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            return await asyncio.gather(*(judge.label([Pair("owl", "bird")]) for _ in range(5)))

    results = asyncio.run(run())
    assert asked == [Pair("owl", "bird")]
    assert [r[0].category for r in results] == [Category.GENERIC] * 5
    assert sorted(r[0].is_cached for r in results) == [False, True, True, True, True]


def test_cancelled_caller_does_not_take_the_label_from_others(fast_config):
    async def handler(request):
        await asyncio.sleep(0.2)
        return reply("generic")

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            first = asyncio.create_task(judge.label([Pair("owl", "bird")]))
            second = asyncio.create_task(judge.label([Pair("owl", "bird")]))
            await asyncio.sleep(0.05)
            first.cancel()
            return await second

    assert asyncio.run(run())[0].category is Category.GENERIC


def test_cascade_empty_and_long_answers_make_no_request(fast_config, tmp_path):
    table = tmp_path / "synonyms.csv"
    table.write_text("snowy owl,Bubo scandiacus\ndog,hound\n")
    config = fast_config(
        "http://127.0.0.1:9/v1", synonyms=str(table), max_answer_chars=20, pause_budget_s=0.1
    )

    async def run():
        async with JudgeClient(config) as judge:
            return await judge.label(
                [
                    Pair("Snowy Owl", " snowy  OWL"),
                    Pair("Snowy Owl", "BUBO_scandiacus"),
                    Pair("owl", "?!"),
                    Pair("owl", "x" * 21),
                    Pair("!", "owl"),
                ]
            )

    exact, synonym, empty, long, no_truth = asyncio.run(run())
    assert exact == Verdict(Category.SPECIFIC, "exact", is_cached=True)
    assert synonym == Verdict(Category.SPECIFIC, "synonym", is_cached=True)
    assert empty.kind is FailureKind.UNPARSABLE
    assert long.kind is FailureKind.TOO_LONG
    assert "21 characters" in long.message
    assert no_truth.kind is FailureKind.UNPARSABLE


LOOKALIKES = [
    ("C++", "C#"),
    ("C", "C#"),
    ("\u0915\u093f", "\u0915\u0940"),  # ki and kii: one letter, two vowel signs
    ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),  # Thai
    ("A*", "A+"),
    ("x", "x\u0336"),
    ("5\u00b0", "5%"),
    ("owl", "owl?"),
]


@pytest.mark.parametrize(("truth", "answer"), LOOKALIKES)
@pytest.mark.parametrize("is_table", [False, True])
def test_what_only_cleaning_makes_equal_is_asked_and_shown_whole(
    truth, answer, is_table, fast_config, tmp_path
):
    """Both would reach the judge as one text: that is not `exact`, and the judge sees the marks."""
    asked = []
    table = tmp_path / "synonyms.json"
    table.write_text(json.dumps([[truth, "first"], [answer, "second"]]))

    async def handler(request):
        asked.append(pair_of(await request.json()))
        return reply("wrong")

    async def run():
        synonyms = str(table) if is_table else ""
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, synonyms=synonyms)) as judge,
        ):
            pairs = [Pair(truth, answer), Pair(truth, truth.lower()), Pair(answer, answer)]
            return await judge.label([*pairs, Pair(truth, "second"), Pair(truth, "first")])

    other, *same, crossed, listed = asyncio.run(run())
    assert other.category is Category.WRONG
    assert [verdict.judge for verdict in same] == ["exact", "exact"]
    assert asked[0] == Pair(fold(truth), fold(answer))
    assert crossed.category is Category.WRONG
    assert listed.judge == ("synonym" if is_table else "scripted")


def test_a_lookalike_can_say_nothing_but_the_truth(fast_config):
    """It is shown with its marks, in JSON, and its letters are those of the ground truth."""
    asked = []
    bad = 'o"}\n\x00\u2028]{w\\"l'

    async def handler(request):
        asked.append((await request.json())["messages"])
        return reply("wrong")

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            return await judge.label([Pair("o w l", bad)])

    asyncio.run(run())
    ((_, user),) = asked
    last = user["content"].rsplit("\n", 1)[1]
    assert json.loads(last)["answer"] == fold(bad)
    assert normalize(fold(bad)) == "o w l"


FAULTS = (
    "403=0.03,404=0.03,429=0.1,500=0.1,503=0.05,reset=0.1,half=0.1,garbage=0.1,enum=0.1,hang=0.01"
)


def test_every_kind_of_fault_and_no_label_lost_or_invented(
    number_judge, fast_config, pairs_of, expect
):
    plan = FaultPlan.parse(FAULTS + ",retry_after=0.02,latency=0.001,latency_sigma=1,seed=3")
    config = {
        "pause_budget_s": 60.0,
        "max_retries": 60,
        "unparsable_retries": 60,
        "timeout_s": 2.0,
        "concurrency": 64,
    }

    async def run():
        async with (
            serve(number_judge, faults=plan) as url,
            JudgeClient(fast_config(url, **config)) as judge,
        ):
            pairs = pairs_of(100)
            return pairs, await judge.label(pairs), judge.stats()

    pairs, outcomes, stats = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(p.answer) for p in pairs]
    assert stats["judge/failed"] == 0
    for kind in ("timeout", "rate_limited", "server", "refused"):
        assert stats[f"judge/error_{kind}"] > 0
    assert stats["judge/requests"] > 170


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("403", FailureKind.REFUSED),
        ("404", FailureKind.REFUSED),
        ("429", FailureKind.RATE_LIMITED),
        ("500", FailureKind.SERVER),
        ("503", FailureKind.SERVER),
        ("reset", FailureKind.SERVER),
        ("half", FailureKind.SERVER),
        ("garbage", FailureKind.SERVER),
        ("enum", FailureKind.UNPARSABLE),
        ("hang", FailureKind.TIMEOUT),
    ],
)
def test_one_poisonous_pair_fails_with_its_kind_while_others_pass(fault, kind, fast_config):
    """The judge is well, but always fails on one pair: that pair alone has no label."""

    async def handler(request):
        pair = pair_of(await request.json())
        if pair.answer != "poison":
            return reply("generic")
        if fault in ("403", "404", "429", "500", "503"):
            return web.json_response({}, status=int(fault))
        if fault == "garbage":
            return web.Response(body=b"\xff{", content_type="application/json")
        if fault == "enum":
            return reply("specific or generic")
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "half":
            response = web.StreamResponse(headers={"Content-Length": "90"})
            await response.prepare(request)
            await response.write(b'{"choices')
            request.transport.abort()
            return response
        request.transport.abort()
        return web.Response()

    async def run():
        async with raw_server(handler) as url:
            config = fast_config(url, max_retries=2, timeout_s=0.5)
            async with JudgeClient(config) as judge:
                pairs = [Pair("owl", "bird"), Pair("owl", "poison"), Pair("owl", "animal")]
                return await asyncio.wait_for(judge.label(pairs), 20), judge.stats()

    (bird, poison, animal), stats = asyncio.run(run())
    assert bird.category is animal.category is Category.GENERIC
    assert isinstance(poison, Failure)
    assert poison.kind is kind
    assert "'poison'" in poison.message
    assert "\n" not in poison.message
    assert stats[f"judge/failed_{kind.value}"] == 1


def ask_with_poison(status, config, pairs, headers=None):
    """Labels `pairs` with a gateway that answers `poison` with `status()`; counts its requests."""
    counts = collections.Counter()

    async def handler(request):
        items = json.loads((await request.json())["messages"][-1]["content"].rsplit("\n", 1)[1])
        is_batch = isinstance(items, list)
        items = items if is_batch else [items]
        is_poisoned = any(item["answer"] == "poison" for item in items)
        counts["poisoned" if is_poisoned else "clean"] += 1
        if is_poisoned:
            error = {"error": {"message": "blocked"}}
            return web.json_response(error, status=status(), headers=headers)
        return reply(json.dumps(["generic"] * len(items)) if is_batch else "generic")

    async def run():
        async with raw_server(handler) as url, JudgeClient(config(url)) as judge:
            judge._pool.probe_waits_s = (0.0, 0.01)
            return await asyncio.wait_for(judge.label(pairs), 30)

    return asyncio.run(run()), counts


def check_only_the_poisoned_pair_failed(pairs, outcomes, kind=FailureKind.REFUSED):
    for pair, outcome in zip(pairs, outcomes, strict=True):
        if pair.answer == "poison":
            assert isinstance(outcome, Failure)
            assert outcome.kind is (kind or outcome.kind)
            assert "'poison'" in outcome.message
        else:
            assert outcome.category is Category.GENERIC


@pytest.mark.parametrize("status", [403, 404])
def test_a_pair_that_a_gateway_refuses_for_ever_fails_alone(status, fast_config, pairs_of):
    """The probe gets through each time, so the endpoint is well and the pair is not."""
    pairs = [*pairs_of(40), Pair("owl", "poison"), *pairs_of(40, 40)]
    outcomes, counts = ask_with_poison(
        lambda: status, lambda url: fast_config(url, max_retries=3), pairs
    )
    check_only_the_poisoned_pair_failed(pairs, outcomes)
    assert counts["poisoned"] == 4  # the first try and judge.max_retries


@pytest.mark.parametrize(
    "statuses", [[403, 404], [403, 500], [404, 429], [401, 403], [408, 403, 502], [307, 403], [409]]
)
def test_a_pair_that_gets_any_mixture_of_refusals_fails_alone(statuses, fast_config, pairs_of):
    """The probe gets through each time; the job's own count and budget run on all the same."""
    answers = itertools.cycle(statuses)
    pairs = [*pairs_of(10), Pair("owl", "poison"), *pairs_of(10, 10)]
    outcomes, counts = ask_with_poison(
        lambda: next(answers),
        lambda url: fast_config(url, max_retries=3, pause_budget_s=0.3),
        pairs,
    )
    check_only_the_poisoned_pair_failed(pairs, outcomes, kind=None)
    if 401 not in statuses:  # a soft refusal counts once a probe has followed three of them
        assert counts["poisoned"] <= (1 + 3) * 3


def test_a_pair_that_gets_a_retry_after_for_ever_fails_alone(fast_config, pairs_of):
    """Ten minutes each time: the endpoint is set aside as it asks, the pause budget ends it."""
    with pytest.raises(JudgeDownError, match="HTTP 429"):
        ask_with_poison(
            lambda: 429,
            lambda url: fast_config(url, max_retries=3, pause_budget_s=0.3),
            [Pair("owl", "poison")],
            {"Retry-After": "600"},
        )


def test_a_pair_that_a_gateway_refuses_spoils_no_batch(fast_config, pairs_of):
    pairs = [*pairs_of(5), Pair("owl", "poison"), *pairs_of(6, 5)]
    settings = {"prompt": "six_way_batch_v1", "pairs_per_request": 4, "structured": "none"}
    outcomes, counts = ask_with_poison(
        lambda: 403, lambda url: fast_config(url, max_retries=2, **settings), pairs
    )
    check_only_the_poisoned_pair_failed(pairs, outcomes)
    assert counts["poisoned"] == 3 + 3  # as part of its batch, then on its own


def test_a_refused_key_costs_no_retry_but_not_more_than_the_pause_budget(fast_config, pairs_of):
    """401 is the endpoint's affair; yet a pair that alone gets it is not asked for ever."""
    pairs = [*pairs_of(20), Pair("owl", "poison")]
    outcomes, counts = ask_with_poison(
        lambda: 401, lambda url: fast_config(url, max_retries=1, pause_budget_s=0.5), pairs
    )
    check_only_the_poisoned_pair_failed(pairs, outcomes)
    assert counts["poisoned"] > 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_judge_that_refuses_everything_stops_the_run(status, fast_config, pairs_of):
    counts = collections.Counter()

    async def handler(request):
        counts["asked"] += 1
        return web.json_response({"error": {"message": "no"}}, status=status)

    async def run():
        async with raw_server(handler) as url:
            config = fast_config(url, max_retries=0, pause_budget_s=0.5, concurrency=4)
            async with JudgeClient(config) as judge:
                await asyncio.wait_for(judge.label(pairs_of(20)), 60)

    with pytest.raises(JudgeDownError, match=f"judge down for 0.5 s .*HTTP {status}"):
        asyncio.run(run())
    assert counts["asked"] < 40


def test_bad_request_is_not_repeated(fast_config):
    asked = []

    async def handler(request):
        asked.append(1)
        return web.json_response({"error": {"message": "too long"}}, status=400)

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            return await judge.label([Pair("owl", "bird")])

    outcome = asyncio.run(run())[0]
    assert outcome.kind is FailureKind.SERVER
    assert len(asked) == 1


def test_retry_after_is_honoured(fast_config):
    times = []

    async def handler(request):
        times.append(asyncio.get_running_loop().time())
        if len(times) == 1:
            return web.json_response({}, status=429, headers={"Retry-After": "0.4"})
        return reply("generic")

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            return await judge.label([Pair("owl", "bird")])

    assert asyncio.run(run())[0].category is Category.GENERIC
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize("concurrency", [1, 32])
def test_outage_pauses_and_resumes_without_a_failure(
    concurrency, number_judge, fast_config, pairs_of, expect
):
    """The judge dies in the middle and comes back on the same port; nothing is lost."""

    async def run():
        async with serve(number_judge, faults=FaultPlan.parse("latency=0.01")) as url:
            port = int(url.rsplit(":", 1)[1].split("/")[0])
            config = fast_config(url, concurrency=concurrency, max_retries=2, timeout_s=2.0)
            judge = await JudgeClient(config).__aenter__()
            pairs = pairs_of(5 * concurrency + 20)
            task = asyncio.create_task(judge.label(pairs))
            await asyncio.sleep(0.08)
        await asyncio.sleep(0.8)
        assert not task.done()
        async with serve(number_judge, port=port):
            outcomes = await asyncio.wait_for(task, 60)
            stats = judge.stats()
            await judge.__aexit__(None, None, None)
        return pairs, outcomes, stats

    pairs, outcomes, stats = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(p.answer) for p in pairs]
    assert stats["judge/failed"] == 0
    assert stats["judge/pause_s"] > 0.5


def test_outage_behind_a_gateway_is_waited_for_too(fast_config, pairs_of):
    """5xx for every request, one at a time: no pair is blamed for it."""
    state = collections.Counter()

    async def handler(request):
        state["asked"] += 1
        if state["asked"] <= 25:
            return web.Response(status=502)
        return reply("generic")

    async def run():
        async with raw_server(handler) as url:
            config = fast_config(url, max_retries=1, concurrency=1, pause_budget_s=60.0)
            async with JudgeClient(config) as judge:
                judge._pool.probe_waits_s = (0.0, 0.01)
                return await judge.label(pairs_of(3)), judge.stats()

    outcomes, stats = asyncio.run(run())
    assert [o.category for o in outcomes] == [Category.GENERIC] * 3
    assert stats["judge/failed"] == 0


def test_judge_gone_for_good_stops_within_the_limit(number_judge, fast_config, pairs_of, tmp_path):
    cache = str(tmp_path / "cache.sqlite")

    async def run():
        async with serve(number_judge) as url:
            config = fast_config(url, pause_budget_s=0.6, cache_path=cache)
            judge = await JudgeClient(config).__aenter__()
            await judge.label(pairs_of(10))
        started = asyncio.get_running_loop().time()
        with pytest.raises(JudgeDownError, match=r"judge down for 0.6 s .* is in the cache"):
            await judge.label(pairs_of(200))
        took = asyncio.get_running_loop().time() - started
        kept = await judge.label(pairs_of(10))
        with pytest.raises(JudgeDownError):  # a fresh budget, not an instant refusal
            await judge.label(pairs_of(11))
        await judge.__aexit__(None, None, None)
        return took, kept

    took, kept = asyncio.run(run())
    assert 0.5 < took < 3.0
    assert all(verdict.is_cached for verdict in kept)
