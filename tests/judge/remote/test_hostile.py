"""Replies that lie, disown themselves, flood or leak: no label from them, no crash, no secret."""

import asyncio
import gzip
import json
import logging
import resource

import pytest

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import JudgeDownError, Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.remote import http as http_room
from speciarl_jax.judge.remote.reply import hide
from speciarl_jax.types import Category, Failure, Verdict
from tests.support.hostile_server import HostileServer, completion, http

POISON = Pair("owl", "poison")


def honest(payload):
    return http(completion("specific" if payload["answer"] == "canary pair" else "generic"))


def ask_with(bad, config):
    """Labels three pairs with a server that answers `poison` with `bad`, else honestly."""
    pairs = [Pair("owl", "bird"), POISON, Pair("owl", "animal")]
    server = HostileServer(
        lambda payload, _: bad if payload["answer"] == "poison" else honest(payload)
    )

    async def run():
        async with server.open() as url, JudgeClient(config(url)) as judge:
            judge._pool.probe_waits_s = (0.0, 0.01)
            return await asyncio.wait_for(judge.label(pairs), 30), judge.stats()

    return *asyncio.run(run()), server


def check_only_poison_failed(outcomes):
    bird, poison, animal = outcomes
    assert bird.category is animal.category is Category.GENERIC
    assert isinstance(poison, Failure), poison
    assert "\n" not in poison.message
    return poison.message


LONE = completion("specific")["choices"][0]
DISOWNED = {
    "error object": completion("specific", error={"message": "overloaded"}),
    "error text": completion("specific", error="no"),
    "error empty": completion("specific", error={}),
    "error in the choice": completion("specific", choice={"error": {"code": 502}}),
    "cut off": completion("specific", choice={"finish_reason": "length"}),
    "filtered": completion("specific", choice={"finish_reason": "content_filter"}),
    "tool call": completion("specific", choice={"finish_reason": "tool_calls"}),
    "finish number": completion("specific", choice={"finish_reason": 3}),
    "refusal": completion("specific", message={"refusal": "I cannot help"}),
    "refusal empty": completion("specific", message={"refusal": ""}),
    "role user": completion("specific", message={"role": "user"}),
    "role system": completion("specific", message={"role": "system"}),
    "role list": completion("specific", message={"role": ["assistant"]}),
    "two that disagree": {"choices": [LONE, completion("wrong")["choices"][0]]},
    "two that agree": {"choices": [LONE, LONE]},
    "no choice": {"choices": []},
    "choices object": {"choices": {"0": LONE}},
    "no content": {"choices": [{"message": {"role": "assistant"}}]},
    "content null": completion(None),
    "content list": completion([{"type": "text", "text": "specific"}]),
    "list": [completion("specific")],
    "content twice": json.dumps(completion("X")).replace(
        '"content": "X"', '"content": "specific", "content": "wrong"'
    ),
    "choices twice": json.dumps(completion("specific"))[:-1] + ', "choices": []}',
    "category twice": completion('{"category": "specific", "category": "wrong"}'),
}


@pytest.mark.parametrize("case", DISOWNED)
def test_a_reply_that_disowns_its_text_is_no_label(case, fast_config):
    outcomes, _, server = ask_with(http(DISOWNED[case]), lambda u: fast_config(u, max_retries=2))
    check_only_poison_failed(outcomes)
    assert server.num_requests < 20


@pytest.mark.parametrize("case", [name for name in DISOWNED if "category" not in name])
def test_a_batch_that_is_disowned_gives_no_label(case, fast_config):
    """The same envelopes around a batch; its pairs then get a try of their own, alone."""
    labels = json.dumps({"1": "wrong", "2": "wrong"})
    bad = json.loads(json.dumps(DISOWNED[case]).replace('"specific"', json.dumps(labels)))
    if isinstance(bad, str):
        bad = bad.replace('"specific"', json.dumps(labels))

    def answer(payload, _):
        if len(payload) > 1:
            return http(bad)
        return http(completion(json.dumps({"1": "generic"})))

    config = {"prompt": "six_way_batch_v2", "pairs_per_request": 2, "structured": "none"}
    config |= {"max_retries": 1, "unparsable_retries": 1}

    async def run():
        async with (
            HostileServer(answer).open() as url,
            JudgeClient(fast_config(url, **config)) as judge,
        ):
            judge._pool.probe_waits_s = (0.0, 0.01)
            return await asyncio.wait_for(judge.label([POISON, Pair("owl", "bird")]), 30)

    assert [outcome.category for outcome in asyncio.run(run())] == [Category.GENERIC] * 2


OWNED = {
    "bare": {"choices": [{"message": {"content": "generic"}}]},
    "nulls": completion(
        choice={"finish_reason": None, "error": None}, message={"refusal": None}, error=None
    ),
    "stop in capitals": completion(choice={"finish_reason": "STOP"}),
    "usage infinite": json.dumps(completion()).replace(": 7", ": Infinity"),
    "usage 1e400": json.dumps(completion()).replace(": 7", ": 1e400"),
    "usage NaN": json.dumps(completion()).replace(": 7", ": NaN"),
    "usage of 4000 digits": json.dumps(completion()).replace(": 7", ": " + "9" * 4000),
    "usage negative": completion(usage={"prompt_tokens": -5}),
    "usage text": completion(usage={"prompt_tokens": "many"}),
    "usage list": completion(usage=[1, 2]),
    "usage null": completion(usage=None),
    "id number": completion(id=5),
    "unknown fields": completion(x={"a": [1]}, system_fingerprint="y"),
}


@pytest.mark.parametrize("case", OWNED)
def test_a_valid_reply_with_odd_fields_is_a_label(case, fast_config):
    outcomes, stats, _ = ask_with(http(OWNED[case]), fast_config)
    assert [outcome.category for outcome in outcomes] == [Category.GENERIC] * 3
    assert 0 <= stats["judge/prompt_tokens"] < 100
    assert stats["judge/requests"] == 3


CRASHES = {
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "deep beside choices": json.dumps(completion("specific"))[:-1] + ', "x":' + "[" * 50_000,
    "number of 5000 digits": json.dumps(completion("specific")).replace(": 7", ": " + "9" * 5000),
    "lone surrogate": completion("\ud800specific"),
    "not UTF-8": b'{"choices": "\xff\xfe"}',
    "UTF-16": json.dumps(completion("wrong thing")).encode("utf-16"),
    "empty": b"",
    "null": "null",
}


@pytest.mark.parametrize("case", CRASHES)
def test_no_reply_crashes_the_client(case, fast_config):
    outcomes, _, _ = ask_with(http(CRASHES[case]), lambda u: fast_config(u, max_retries=1))
    check_only_poison_failed(outcomes)


RETRY_AFTERS = ["Fri, 31 Dec 9999 23:59:59 -2300", "1e400", "9" * 4000, "-1e400", "\xff"]
RETRY_AFTERS += [f"Fri, 31 Dec {'9' * 20} 23:59:59 GMT"]


@pytest.mark.parametrize("value", RETRY_AFTERS)
def test_no_retry_after_crashes_the_client(value, fast_config):
    answers = iter([http("{}", "429 Slow", [f"Retry-After: {value}"])])

    async def run():
        server = HostileServer(lambda payload, _: next(answers, None) or honest(payload))
        async with server.open() as url:
            config = fast_config(url, pause_budget_s=0.5)
            async with JudgeClient(config) as judge:
                return await asyncio.wait_for(judge.label([Pair("owl", "bird")]), 30)

    if value in RETRY_AFTERS[:3]:  # an endpoint that wants a day is given up for now
        with pytest.raises(JudgeDownError, match="HTTP 429"):
            asyncio.run(run())
    else:
        assert isinstance(asyncio.run(run())[0], Verdict)


async def endless(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(3000):  # 200 MB
        writer.write(b" " * 65536)
        await writer.drain()


async def endless_chunks(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(3000):
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await writer.drain()


def big(size):
    return http(b" " * size + json.dumps(completion("specific")).encode())


BOMB = gzip.compress(b" " * 100_000_000 + json.dumps(completion("specific")).encode())
FLOODS = {
    "endless": endless,
    "endless chunks": endless_chunks,
    "100 MB": big(100_000_000),
    "a byte too many": big(64 * 1024 + 1 - len(json.dumps(completion("specific")))),
    "gzip bomb": http(BOMB, headers=["Content-Encoding: gzip"]),
    "gzip in capitals": http(BOMB, headers=["CONTENT-ENCODING: GZIP"]),
    "deflate": http(b"x", headers=["Content-Encoding: deflate"]),
    "plain, but called compressed": http(completion("specific"), headers=["Content-Encoding: br"]),
    "error of 100 MB": http(b"x" * 100_000_000, "500 No"),
    "header of 1 MB": http(completion("specific"), headers=["X: " + "y" * 1_000_000]),
    "100,000 headers": http(completion("specific"), headers=["X: y"] * 100_000),
}


@pytest.mark.parametrize("case", FLOODS)
def test_no_more_is_read_than_a_reply_may_have(case, fast_config):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, _, server = ask_with(FLOODS[case], lambda u: fast_config(u, max_retries=1))
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    check_only_poison_failed(outcomes)
    assert grown_mb < 100  # the server's own share included
    assert all("accept-encoding: identity\r\n" in head.lower() for head in server.heads)


def test_the_largest_reply_that_is_allowed_is_read(fast_config):
    body = json.dumps(completion("generic"))
    outcomes, _, _ = ask_with(http(" " * (64 * 1024 - len(body)) + body), fast_config)
    assert outcomes[1].category is Category.GENERIC


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_and_their_target_is_told(status, fast_config):
    elsewhere = HostileServer(lambda payload, _: http(completion("specific")))

    async def run(is_checked):
        async with elsewhere.open() as target:
            secret = target.replace("http://", "http://user:hunter2@") + "/chat/completions?k=hush"
            moved = http("", f"{status} Moved", [f"Location: {secret}"])
            async with (
                HostileServer(lambda *_: moved).open() as url,
                JudgeClient(fast_config(url, pause_budget_s=0.3)) as judge,
            ):
                with pytest.raises(JudgeError) as info:
                    await (judge.check_health(5) if is_checked else judge.label([POISON]))
                return target, str(info.value)

    for is_checked in (True, False):
        target, message = asyncio.run(run(is_checked))
        assert f"HTTP {status}: redirects to {target}, which is not followed" in message
        assert "judge.endpoints" in message
        assert "hunter2" not in message
        assert "hush" not in message
    assert elsewhere.num_requests == 0


KEY = "sk-Aa+/=\"9'secret"


def echoes(key):
    """Ways in which a server says a key back."""
    for text in (key, json.dumps(key)[1:-1], "x" * 290 + key, "x" * 55 + key):
        yield http({"error": {"message": f"bad key {text}"}}, "401 No")
        yield http({"error": {"message": f"bad key {text}"}}, "403 No")
        yield http(f"plain {text}", "500 No")
        yield http({"error": text}, "429 No")
        yield http(completion("specific", error={"message": text}))
        yield http(completion(text))
        yield http({"said": text})
        yield http(f"<html>{text}")
        yield http(completion("specific", message={"role": text}))
        yield http(completion("specific", choice={"finish_reason": text}))
    yield http("", "307 No", [f"Location: http://h/{key.replace(chr(34), '%22')}/v1"])


@pytest.mark.parametrize("number", range(41))
def test_a_key_that_the_server_says_back_is_shown_to_nobody(
    number, fast_config, monkeypatch, caplog
):
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    bad = list(echoes(KEY))[number]
    caplog.set_level(logging.DEBUG)

    async def run():
        async with HostileServer(lambda *_: bad).open() as url:
            config = fast_config(
                url, api_key_env="MY_JUDGE_KEY", max_retries=1, pause_budget_s=0.2, backoff_s=0.01
            )
            said = []
            async with JudgeClient(config) as judge:
                judge._pool.probe_waits_s = (0.0, 0.01)
                with pytest.raises(JudgeError) as info:
                    await judge.check_health(0.2)
                said.append(str(info.value))
                try:
                    said += [o.message for o in await asyncio.wait_for(judge.label([POISON]), 30)]
                except JudgeError as error:
                    said.append(str(error))
            return said

    said = [*asyncio.run(run()), caplog.text]
    for part in (KEY, KEY[:8], KEY[-6:], json.dumps(KEY)[1:-1]):
        assert part not in "".join(said)


def test_hide_knows_a_key_in_every_spelling():
    from base64 import b64encode
    from urllib.parse import quote

    for text in (KEY, json.dumps(KEY), quote(KEY, safe=""), b64encode(KEY.encode()).decode()):
        assert "[key]" in hide(KEY, f"a {text} b")
        assert "secret" not in hide(KEY, f"a {text} b")
    assert hide("none", "none of it") == "none of it"
    assert hide("", "all of it") == "all of it"


@pytest.mark.parametrize("given", ["sk-abc123", "hf_abcDEF123", "A KEY", "9KEY", "K" * 65, "É"])
def test_a_key_given_for_its_variable_is_refused_unseen(given, fast_config):
    with pytest.raises(ValueError, match="expected the NAME of an environment variable") as info:
        fast_config("http://h/v1", api_key_env=given).validate()
    assert given not in str(info.value)


@pytest.mark.parametrize("value", ["two words", "line\nend", "ключ"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(value, fast_config, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", value)
    with pytest.raises(ValueError, match="which cannot be sent") as info:
        JudgeClient(fast_config("http://h/v1", api_key_env="MY_JUDGE_KEY"))
    assert value not in str(info.value)


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@h/v1", "http://hunter2@h/v1", "http://h/v1?key=hunter2",
     "http://h/v1#hunter2", "hunter2:8000", "http://h:hunter2/v1", "http://h/v1 hunter2"],
)  # fmt: skip
def test_an_endpoint_with_a_secret_is_refused_unseen(url):
    voters = (f"endpoints={url}", "model=b")
    for config in (
        JudgeConfig(kind="endpoint", endpoints=("http://h/v1", url), model="m"),
        JudgeConfig(kind="endpoint", endpoints=(url,), model="m", mode="replay", recording="r"),
        JudgeConfig(kind="endpoint", endpoints=("http://h/v1",), model="m", voters=voters),
    ):
        with pytest.raises(ValueError, match=r"judge.endpoints: number [12] ") as info:
            config.validate()
        assert "hunter2" not in str(info.value)


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
