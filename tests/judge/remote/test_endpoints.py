import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess

import pytest
from aiohttp import web

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.remote.prompt import load_prompt
from speciarl_jax.judge.remote.request import build_body
from speciarl_jax.types import Category, Verdict
from tests.support.raw_server import raw_server, reply


def test_least_loaded_endpoint_and_a_dead_one_left_and_rejoined(
    number_judge, fast_config, pairs_of
):
    plan = FaultPlan.parse("latency=0.01")

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(serve(number_judge, faults=plan))
            async with serve(number_judge, faults=plan) as second:
                port = int(second.rsplit(":", 1)[1].split("/")[0])
                config = fast_config(first, second, concurrency=8)
                judge = await stack.enter_async_context(JudgeClient(config))
                await judge.label(pairs_of(80))
                shares = [e.breaker.num_successes for e in judge._pool.endpoints]
            outcomes = await judge.label(pairs_of(40, 100))
            up_without = judge.stats()["judge/endpoints_up"]
            await stack.enter_async_context(serve(number_judge, port=port))
            for _ in range(60):
                if judge.stats()["judge/endpoints_up"] == 2:
                    break
                await asyncio.sleep(0.1)
            up_again = judge.stats()["judge/endpoints_up"]
            before = judge._pool.endpoints[1].breaker.num_successes
            await judge.label(pairs_of(40, 200))
            after = judge._pool.endpoints[1].breaker.num_successes
            return shares, outcomes, up_without, up_again, after - before

    shares, outcomes, up_without, up_again, served = asyncio.run(run())
    assert min(shares) >= 30
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)
    assert up_without == 1
    assert up_again == 2
    assert served > 5


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "HTTP 401"), (403, "HTTP 403"), (404, "HTTP 404")]
)
def test_refused_key_or_model_is_told_at_once(status, hint, fast_config):
    async def handler(request):
        return web.json_response({"error": {"message": "no"}}, status=status)

    async def run():
        async with raw_server(handler) as url, JudgeClient(fast_config(url)) as judge:
            await asyncio.wait_for(judge.check_health(30.0), timeout=30.0)

    with pytest.raises(JudgeError, match=hint):
        asyncio.run(run())


def test_batch_prompt_asks_several_at_once_and_splits_a_bad_batch(fast_config, pairs_of, expect):
    sizes = []

    async def handler(request):
        body = await request.json()
        items = json.loads(body["messages"][-1]["content"].rsplit("\n", 1)[1])
        sizes.append(len(items))
        names = [expect(item["answer"]).label for item in items]
        if len(items) > 1 and any(item["answer"] == "name 5" for item in items):
            names.pop()
        return reply(json.dumps(names))

    async def run():
        config = {"prompt": "six_way_batch_v1", "pairs_per_request": 4, "structured": "none"}
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, unparsable_retries=1, **config)) as judge,
        ):
            return await judge.label(pairs_of(12))

    outcomes = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(12)]
    assert sorted(sizes) == [1, 1, 1, 1, 4, 4, 4, 4]


def by_id(labels):
    return json.dumps({str(number): label for number, label in enumerate(labels, start=1)})


BATCH_LIES = {
    "reversed list": lambda names: json.dumps(names[::-1]),
    "list": json.dumps,
    "shifted ids": lambda names: json.dumps(
        {str(number): name for number, name in enumerate(names, start=2)}
    ),
    "one missing": lambda names: by_id(names[:-1]),
    "one more": lambda names: by_id([*names, "wrong"]),
    "one twice": lambda names: by_id(names)[:-1] + ', "1": "wrong"}',
    "ids of numbers with a point": lambda names: by_id(names).replace('"1"', '"1.0"'),
}


@pytest.mark.parametrize("lie", BATCH_LIES)
def test_a_batch_by_id_cannot_be_mixed_up(lie, fast_config, pairs_of, expect):
    """What is not exactly one label for each id is asked again, at last one pair at a time."""
    sizes = []

    async def handler(request):
        items = json.loads((await request.json())["messages"][-1]["content"].rsplit("\n", 1)[1])
        sizes.append(len(items))
        names = [expect(item["answer"]).label for item in items]
        return reply(BATCH_LIES[lie](names) if len(items) > 1 else by_id(names))

    async def run():
        config = {"prompt": "six_way_batch_v2", "pairs_per_request": 4, "structured": "none"}
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, unparsable_retries=1, **config)) as judge,
        ):
            return await judge.label(pairs_of(8))

    outcomes = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(8)]
    assert sorted(sizes) == [1] * 8 + [4] * 4


def test_a_batch_by_id_may_come_in_any_order(fast_config, pairs_of, expect):
    async def handler(request):
        items = json.loads((await request.json())["messages"][-1]["content"].rsplit("\n", 1)[1])
        named = {str(item["id"]): expect(item["answer"]).label for item in reversed(items)}
        return reply(json.dumps(named))

    async def run():
        config = {"prompt": "six_way_batch_v2", "pairs_per_request": 4, "structured": "none"}
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, **config)) as judge,
        ):
            return await judge.label(pairs_of(8)), judge.stats()["judge/requests"]

    outcomes, asked = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(8)]
    assert asked == 2


@pytest.mark.parametrize("prompt", ["six_way_batch_v1", "six_way_batch_v2", "binary_batch_v2"])
@pytest.mark.parametrize("structured", ["auto", "json_schema", "none"])
def test_batches_at_the_offline_judge(prompt, structured, number_judge, fast_config, expect):
    pairs = [Pair("owl", f"name {number}") for number in range(10)]

    async def run():
        config = {"prompt": prompt, "pairs_per_request": 4, "structured": structured}
        async with (
            serve(number_judge) as url,
            JudgeClient(fast_config(url, **config)) as judge,
        ):
            await judge.check_health(5)
            return await judge.label(pairs)

    for pair, outcome in zip(pairs, asyncio.run(run()), strict=True):
        right = expect(pair.answer)
        if prompt.startswith("binary"):
            right = Category.SPECIFIC if right >= Category.SPECIFIC else Category.WRONG
        assert outcome.category is right


def test_constraints_of_a_batch_by_id_name_each_id():
    prompt = load_prompt("binary_batch_v2")
    config = JudgeConfig(kind="endpoint", endpoints=("http://h/v1",), model="m")
    pairs = [Pair("a", "b"), Pair("c", "d")]
    schema = build_body(config, prompt, pairs, "json_schema", "off")["response_format"]
    schema = schema["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["1", "2"]
    assert build_body(config, prompt, pairs, "grammar", "off")["grammar"] == (
        'root ::= "{" "\\"1\\": " label ", " "\\"2\\": " label "}"\n'
        'label ::= "\\"correct\\"" | "\\"incorrect\\""'
    )


def test_binary_prompt(tree_path, fast_config):
    from speciarl_jax.judge.offline.taxonomy import TaxonomyJudge

    async def run():
        async with (
            serve(TaxonomyJudge.from_path(tree_path)) as url,
            JudgeClient(fast_config(url, prompt="binary_v1")) as judge,
        ):
            pairs = [
                Pair("scarlet finch", "fringella coccinea"),
                Pair("scarlet finch", "finch"),
            ]
            return await judge.label(pairs)

    right, broad = asyncio.run(run())
    assert right.category is Category.SPECIFIC
    assert broad.category is Category.WRONG


@pytest.mark.parametrize("offers", ["choice", "json_schema", "grammar", "none"])
def test_auto_finds_the_constraint_that_a_server_really_applies(offers, fast_config):
    """The server ignores unknown fields, as most do; only `offers` has an effect on it."""
    seen = []

    async def handler(request):
        body = await request.json()
        keys = {"choice": "structured_outputs", "json_schema": "response_format"}
        has = keys.get(offers, offers) in body
        seen.append(body)
        if "payload" not in str(body) and "banana" in str(body["messages"]) and not has:
            return reply("banana")
        return reply('{"category": "generic"}' if offers == "json_schema" else "generic")

    async def run():
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, structured="auto")) as judge,
        ):
            return await judge.label([Pair("owl", "bird"), Pair("owl", "animal")])

    outcomes = asyncio.run(run())
    assert [o.category for o in outcomes] == [Category.GENERIC] * 2
    last = seen[-1]
    assert last["temperature"] == 0
    assert last["chat_template_kwargs"] == {"enable_thinking": False}
    assert ("structured_outputs" in last) == (offers == "choice")
    assert ("response_format" in last) == (offers == "json_schema")
    assert ("grammar" in last) == (offers == "grammar")


def test_strict_server_gets_no_field_it_does_not_know(fast_config):
    async def handler(request):
        body = await request.json()
        unknown = set(body) - {"model", "messages", "temperature", "max_tokens", "response_format"}
        if unknown:
            return web.json_response({"error": {"message": f"unknown {unknown}"}}, status=400)
        return reply('{"category": "generic"}' if "response_format" in body else "generic")

    async def run():
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, structured="auto")) as judge,
        ):
            outcome = (await judge.label([Pair("owl", "bird")]))[0]
            return outcome, judge._pool.endpoints[0]._constraint

    outcome, constraint = asyncio.run(run())
    assert outcome.category is Category.GENERIC
    assert constraint == "json_schema"


def test_api_key_comes_from_the_named_variable(fast_config, monkeypatch):
    headers = []

    async def handler(request):
        headers.append(request.headers["Authorization"])
        return reply("generic")

    async def run():
        async with (
            raw_server(handler) as url,
            JudgeClient(fast_config(url, api_key_env="MY_JUDGE_KEY")) as judge,
        ):
            return await judge.label([Pair("owl", "bird")])

    with pytest.raises(
        ValueError, match="api_key_env: the environment variable that it names is not set"
    ):
        asyncio.run(run())
    monkeypatch.setenv("MY_JUDGE_KEY", "abc")
    asyncio.run(run())
    assert headers == ["Bearer abc"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mode": "maybe"}, "judge.mode='maybe': expected one of live, record, replay"),
        ({"mode": "replay"}, "set judge.recording"),
        ({"concurrency": 0}, "judge.concurrency=0: set it to 1 or more"),
        ({"timeout_s": 0.0}, "judge.timeout_s=0.0: set seconds above 0"),
        ({"endpoints": ()}, "set judge.endpoints"),
        ({"endpoints": ("http://h/v1", "host:80")}, "number 2 is no URL"),
        ({"endpoints": ("http://[::1/v1",)}, "number 1 is no URL"),
        ({"endpoints": ("http://h:99999/v1",)}, "number 1 is no URL"),
        ({"endpoints": ("http:///v1",)}, "number 1 is no URL"),
        ({"model": ""}, "set judge.model"),
        ({"pairs_per_request": 2, "structured": "none"}, "needs a batch prompt"),
        ({"pairs_per_request": 2}, "structured=choice constrains one label"),
        ({"kind": "taxonomy", "endpoints": (), "taxonomy": "/no"}, "set judge.taxonomy"),
    ],
)
def test_bad_settings_say_what_to_set(overrides, message):
    base = {"kind": "endpoint", "endpoints": ("http://h/v1",), "model": "m", "structured": "choice"}
    with pytest.raises(ValueError, match=message):
        JudgeClient(JudgeConfig(**{**base, **overrides}))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of its own for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=judge -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize("is_known", [True, False])
def test_tls_is_verified_and_its_connections_are_used_again(
    is_known, certificate, fast_config, pairs_of, monkeypatch
):
    peers = set()

    async def handler(request):
        peers.add(request.transport.get_extra_info("peername"))
        return reply("generic")

    async def run():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        async with (
            raw_server(handler, ssl_context=context) as url,
            JudgeClient(fast_config(url, concurrency=2, pause_budget_s=0.3)) as judge,
        ):
            await judge.check_health(0.2)
            return await judge.label(pairs_of(20))

    if is_known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert {o.category for o in asyncio.run(run())} == {Category.GENERIC}
        assert len(peers) <= 2
    else:
        with pytest.raises(JudgeError, match="certificate verify failed"):
            asyncio.run(run())
        assert not peers
