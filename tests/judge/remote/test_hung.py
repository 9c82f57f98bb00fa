"""An endpoint that takes requests and never answers is found out once, for all who wait on it."""

import asyncio
import contextlib

import pytest

from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.remote.http import Http
from speciarl_jax.judge.remote.reply import AskError
from speciarl_jax.judge.remote.request import Door, send
from speciarl_jax.types import FailureKind
from tests.support.hostile_server import HostileServer, completion, http
from tests.support.raw_server import raw_server, reply


async def never(writer):
    await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def hung_server():
    server = HostileServer(lambda payload, number: never)
    async with server.open() as url:
        yield server, url


@pytest.mark.parametrize("structured", ["auto", "choice"])
def test_a_hung_endpoint_among_two_is_found_out_once(
    structured, number_judge, fast_config, pairs_of, expect
):
    """One time-out, then all who wait there go on; not one after the other, not once a worker."""

    async def run():
        async with hung_server() as (server, hung), serve(number_judge) as well:
            config = fast_config(
                hung, well, structured=structured, timeout_s=1.0, concurrency=16, max_retries=1
            )
            async with JudgeClient(config) as judge:
                judge._pool.probe_waits_s = (60.0,)
                outcomes = await asyncio.wait_for(judge.label(pairs_of(200)), 60)
                return outcomes, server.num_requests, judge.stats()

    outcomes, num_asked, stats = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(200)]
    assert num_asked <= (1 if structured == "auto" else 16)
    assert stats["judge/error_timeout"] <= 16


def test_who_waits_beside_a_timed_out_request_is_sent_away_unblamed():
    async def run():
        async with hung_server() as (_, url):
            door = Door(Http(), url, "none")
            first = asyncio.create_task(send(door, BODY, 0.4, 1))
            await asyncio.sleep(0.2)
            others = [asyncio.create_task(send(door, BODY, 0.4, 1)) for _ in range(3)]
            _, waiting = await asyncio.wait([first, *others], timeout=30)
            await door.http.close()
            return first.result(), [task.result() for task in others], waiting

    first, others, waiting = asyncio.run(run())
    assert not waiting
    assert first == AskError(FailureKind.TIMEOUT, "no reply within 0.4 s", is_hard=True)
    for other in others:
        assert other.kind is FailureKind.TIMEOUT
        assert other.is_of_endpoint
        assert "has answered nobody" in other.message


def test_one_slow_pair_does_not_hang_the_endpoint():
    """Others were answered while it waited: only it has timed out."""

    async def run():
        def answer(payload, number):
            return never if number == 1 else http(completion())

        async with HostileServer(answer).open() as url:
            door = Door(Http(), url, "none")
            slow = asyncio.create_task(send(door, BODY, 0.5, 1))
            await asyncio.sleep(0.1)
            quick = await send(door, BODY, 0.5, 1)
            result = await slow
            await door.http.close()
            return result, quick

    slow, quick = asyncio.run(run())
    assert slow == AskError(FailureKind.TIMEOUT, "no reply within 0.5 s", is_hard=False)
    assert quick.text == "generic"


def test_health_is_known_as_soon_as_one_of_several_answers(fast_config):
    async def handler(request):
        return reply("generic")

    async def run():
        async with (
            hung_server() as (_, hung),
            raw_server(handler) as well,
            JudgeClient(fast_config(hung, well, timeout_s=3600.0)) as judge,
        ):
            for endpoint in judge._pool.endpoints:
                endpoint.probe_limit_s = 3600.0
            await asyncio.wait_for(judge.check_health(3600), 20)

    asyncio.run(run())


def test_a_negotiation_that_nobody_waits_for_ends(fast_config):
    """A probe gives up after its own limit; the next one asks afresh and finds the judge well."""
    numbers = []

    def answer(payload, number):
        numbers.append(number)
        return never if number == 1 else http(completion())

    async def run():
        async with HostileServer(answer).open() as url:
            config = fast_config(url, structured="auto", timeout_s=3600.0)
            async with JudgeClient(config) as judge:
                judge._pool.endpoints[0].probe_limit_s = 0.2
                await asyncio.wait_for(judge.check_health(10), 20)
                return judge._pool.endpoints[0]._constraint

    assert asyncio.run(run()) == "choice"


BODY = {"messages": [{"content": "{}"}]}
