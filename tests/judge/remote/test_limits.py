import asyncio
import random
import time

import pytest

from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.remote.breaker import Breaker
from speciarl_jax.judge.remote.limiter import RateLimiter
from speciarl_jax.judge.remote.reply import parse_retry_after


def waits(limiter, count, tokens=0.0):
    return [round(limiter.reserve(tokens), 6) for _ in range(count)]


def test_limiter_by_hand():
    now = [100.0]
    limiter = RateLimiter(120, 0, clock=lambda: now[0], burst_s=1.0)  # two a second
    assert waits(limiter, 5) == [0.0, 0.0, 0.0, 0.5, 1.0]
    now[0] += 10.0
    assert waits(limiter, 4) == [0.0, 0.0, 0.0, 0.5]


def test_token_limit_by_hand():
    now = [0.0]
    limiter = RateLimiter(0, 6000, clock=lambda: now[0], burst_s=1.0)  # 100 a second
    assert waits(limiter, 4, tokens=100) == [0.0, 0.0, 1.0, 2.0]
    limiter.correct(-200)  # the replies were shorter than estimated
    assert waits(limiter, 1, tokens=100) == [1.0]


def test_no_limit_never_waits():
    assert set(waits(RateLimiter(0, 0), 1000, 1e9)) == {0.0}


@pytest.mark.parametrize("setting", ["requests_per_minute", "tokens_per_minute"])
def test_limits_hold_over_http_and_are_shared_between_hosts(
    setting, number_judge, fast_config, pairs_of
):
    limit = 600 if setting == "requests_per_minute" else 250_000  # about 400 tokens a request

    async def run():
        async with serve(number_judge) as url:
            config = fast_config(url, num_hosts=2, **{setting: limit})
            async with JudgeClient(config) as judge:
                started = time.monotonic()
                await judge.label(pairs_of(12))
                return time.monotonic() - started, judge.stats()

    took, stats = asyncio.run(run())
    cost = 12 if setting == "requests_per_minute" else stats["judge/prompt_tokens"]
    assert took > 60 * cost / (limit / 2) - 1.3  # one second of burst
    assert stats["judge/limited_s"] > 0


def test_breaker_needs_a_whole_round_of_failures():
    breaker = Breaker(3)
    assert not breaker.record_failure("x", num_in_flight=8)
    for _ in range(6):
        assert not breaker.record_failure("x", num_in_flight=8)
    assert breaker.record_failure("why", num_in_flight=8)
    assert breaker.is_open
    assert breaker.reason == "why"
    assert not breaker.record_failure("x", num_in_flight=8)  # already open
    breaker.close()
    assert not breaker.is_open


def test_breaker_success_starts_the_count_again():
    breaker = Breaker(2)
    breaker.record_failure("x", 1)
    breaker.record_success()
    assert not breaker.record_failure("x", 1)
    assert breaker.record_failure("x", 1)


def test_breaker_opens_at_once_on_hard_evidence():
    assert Breaker(100).record_failure("refused", 1, is_hard=True)


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({}, 0, 0),
        ({"retry-after": "2.5"}, 2.5, 2.5),
        ({"retry-after": "-1"}, 0, 0),
        ({"retry-after": "nan"}, 0, 0),
        ({"retry-after": "soon"}, 0, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"}, 86_400, 86_400),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -0000"}, 0, 86_400),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -2300"}, 0, 86_400),
        ({"retry-after": "Mon, 01 Jan 0001 00:00:00 +2300"}, 0, 86_400),
        ({"retry-after": "Fri, 99 Dec 99999 23:59:59 GMT"}, 0, 0),
        ({"retry-after": f"Fri, 31 Dec {'9' * 20} 23:59:59 GMT"}, 0, 0),
        ({"retry-after": f"Fri, 31 Dec 2100 23:59:59 +{'9' * 20}"}, 0, 0),
        ({"retry-after": f"Fri, 31 Dec 2100 {'9' * 20}:59:59 GMT"}, 0, 0),
        ({"retry-after": "1e400"}, 86_400, 86_400),
        ({"retry-after": "9" * 5000}, 86_400, 86_400),
        ({"retry-after-ms": "inf", "retry-after": "1"}, 86_400, 86_400),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0, 0),
    ],
)
def test_retry_after(headers, low, high):
    assert low <= parse_retry_after(headers) <= high


def test_fault_plan():
    plan = FaultPlan.parse("429=0.25, hang=0.25, latency=0.5, latency_sigma=0, seed=4")
    rng, twin = random.Random(plan.seed), random.Random(4)
    drawn = [plan.fault(rng) for _ in range(4000)]
    assert drawn == [plan.fault(twin) for _ in range(4000)]
    assert drawn.count("429") == pytest.approx(1000, abs=120)
    assert drawn.count("") == pytest.approx(2000, abs=150)
    assert plan.latency_s(rng) == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teapot=1", "'teapot' is unknown"),
        ("429=lots", "expected 429=NUMBER"),
        ("429=0.7,500=0.6", "at most 1 in total"),
    ],
)
def test_bad_fault_plan(text, message):
    with pytest.raises(ValueError, match=message):
        FaultPlan.parse(text)
