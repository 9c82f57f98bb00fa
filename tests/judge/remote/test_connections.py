"""Which connection is used again, and whose reply comes out of it."""

import asyncio

import pytest

from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.remote import http as http_room
from speciarl_jax.types import Category, Verdict
from tests.support.hostile_server import HostileServer, completion, http


def label_of(number):
    return Category(number % 6)


def numbered(payload, **fields):
    number = int(payload["answer"].rsplit(" ", 1)[1]) if "name" in payload["answer"] else 0
    return http(completion(label_of(number).label, **fields))


def twice_at_once(payload, number):
    return numbered(payload) + http(completion(label_of(number + 1).label))


def twice_in_two_writes(payload, number):
    async def write(writer):
        writer.write(numbered(payload))
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(http(completion("wrong")))
        await writer.drain()

    return write


def twice_with_half_a_head(payload, number):
    async def write(writer):
        second = http(completion("wrong"))
        writer.write(numbered(payload) + second[:20])
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(second[20:])
        await writer.drain()

    return write


@pytest.mark.parametrize("answer", [twice_at_once, twice_in_two_writes, twice_with_half_a_head])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_second_response_is_no_label_of_the_next_pair(answer, concurrency, fast_config, caplog):
    async def run():
        async with HostileServer(answer).open() as url:
            config = fast_config(url, concurrency=concurrency, max_retries=20)
            found = []
            async with JudgeClient(config) as judge:
                for start in range(0, 60, 20):
                    pairs = [Pair("owl", f"name {n}") for n in range(start, start + 20)]
                    found += await asyncio.wait_for(judge.label(pairs), 30)
                    await asyncio.sleep(0.03)  # idle connections have bytes on them now
            return found

    outcomes = asyncio.run(run())
    told = [(n, o.category) for n, o in enumerate(outcomes) if isinstance(o, Verdict)]
    assert [category for _, category in told] == [label_of(n) for n, _ in told]
    assert len(told) == 60


def test_a_server_that_answered_unasked_gets_each_connection_once(fast_config, caplog):
    def answer(payload, number):
        async def write(writer):
            writer.write(numbered(payload))
            await writer.drain()
            await asyncio.sleep(0.01)  # the connection has been put aside by now
            if number == 1:
                writer.write(http(completion("wrong")))

        return write

    async def run():
        server = HostileServer(answer)
        async with server.open() as url, JudgeClient(fast_config(url, concurrency=1)) as judge:
            for number in range(6):
                await judge.label([Pair("owl", f"name {number}")])
                await asyncio.sleep(0.02)
        return server.num_connections

    assert asyncio.run(run()) >= 6
    assert caplog.text.count("a response that was not asked for") == 1


def test_a_reply_with_the_id_of_an_earlier_one_is_asked_again(fast_config):
    """A gateway that sends the last response once more, late: only its id gives it away."""
    last = []

    def answer(payload, number):
        if number in (4, 5):
            return last[-1]
        last.append(numbered(payload, id=f"reply {number}"))
        return last[-1]

    async def run():
        async with (
            HostileServer(answer).open() as url,
            JudgeClient(fast_config(url, concurrency=1)) as judge,
        ):
            return await judge.label([Pair("owl", f"name {n}") for n in range(6)])

    assert [o.category for o in asyncio.run(run())] == [label_of(n) for n in range(6)]


def test_replies_that_are_one_behind_from_the_start_are_never_believed(fast_config):
    """The very first reply comes twice; whoever goes on there gets each label one pair late."""
    state = {}

    def answer(payload, number):
        async def write(writer):
            own = numbered(payload, id=f"reply {number}")
            state.setdefault("writer", writer)
            if number == 1:
                state["first"] = own
            elif number == 2:
                state["behind"], own = own, state["first"]
            elif writer is state["writer"]:
                writer.write(state["behind"])
                state["behind"], own = own, b""
            writer.write(own)

        return write

    async def run():
        async with (
            HostileServer(answer).open() as url,
            JudgeClient(fast_config(url, concurrency=1)) as judge,
        ):
            pairs = [Pair("owl", f"name {n}") for n in range(8)]
            return await asyncio.wait_for(judge.label(pairs), 30)

    assert [o.category for o in asyncio.run(run())] == [label_of(n) for n in range(8)]


@pytest.mark.parametrize(("name", "num_again"), [("judge", 1), ("", 0), (None, 0), (7, 0)])
def test_a_server_that_numbers_no_reply_is_believed(name, num_again, fast_config):
    """One name for all is first taken for one reply twice; nothing else changes."""

    async def run():
        server = HostileServer(lambda payload, _: numbered(payload, id=name))
        async with server.open() as url, JudgeClient(fast_config(url, concurrency=4)) as judge:
            outcomes = await judge.label([Pair("owl", f"name {n}") for n in range(20)])
        return outcomes, server.num_requests, server.num_connections

    outcomes, num_requests, num_connections = asyncio.run(run())
    assert [o.category for o in outcomes] == [label_of(n) for n in range(20)]
    assert num_requests == 20 + num_again
    assert num_connections <= 4 * (1 + num_again)


@pytest.mark.filterwarnings("ignore:BasicAuth:DeprecationWarning")  # its successor is too new
def test_the_environments_proxy_is_for_other_hosts_only(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:pass@proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    url, auth = http_room.find_proxy("http://judge.example/v1")
    assert (url, auth.login, auth.password) == ("http://proxy:3128", "user", "pass")
    for ours in ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://inside.example/v1"):
        assert http_room.find_proxy(ours) == (None, None)
