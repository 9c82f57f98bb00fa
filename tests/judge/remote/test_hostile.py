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


# Most of a case is waiting; the default suite takes each kind of place once or twice.
@pytest.mark.parametrize(
    "number", [n if n % 5 == 0 else pytest.param(n, marks=pytest.mark.slow) for n in range(41)]
)
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
