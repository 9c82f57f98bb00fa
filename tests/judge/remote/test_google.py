"""Google credentials against a token server on this machine; skipped without google-auth."""

import asyncio
import contextlib
import json
import sys

import pytest
from aiohttp import web

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import JudgeDownError
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.remote.google_auth import GoogleToken
from speciarl_jax.types import Verdict
from tests.support.raw_server import raw_server, reply


@pytest.fixture(scope="module")
def service_account(tmp_path_factory):
    """Makes a service account's key file that points at a token URL."""
    pytest.importorskip("google.auth")
    pytest.importorskip("google.auth.transport.requests")
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import serialization

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()

    def make(token_url):
        path = tmp_path_factory.mktemp("google") / "account.json"
        account = {
            "type": "service_account",
            "client_email": "judge@example.com",
            "private_key": text,
            "private_key_id": "1",
            "token_uri": token_url,
        }
        path.write_text(json.dumps(account))
        return str(path)

    return make


@contextlib.asynccontextmanager
async def token_server(answers):
    """Gives out the answers in turn, the last one for ever; None breaks the connection."""
    asked = []

    async def handle(request):
        form = await request.post()
        asked.append(form["grant_type"])
        answer = answers[min(len(asked), len(answers)) - 1]
        if answer is None:
            request.transport.abort()
            return web.Response()
        status, body = answer
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/token", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/token", asked
    finally:
        await runner.cleanup()


def token(name, seconds):
    return 200, {"access_token": name, "expires_in": seconds, "token_type": "Bearer"}


def run_judge(answers, service_account, fast_config, monkeypatch, calls, **overrides):
    """Labels one pair after another; returns outcomes, tokens the judge saw, token requests."""

    async def run():
        seen = []

        async def handler(request):
            seen.append(request.headers["Authorization"])
            return reply("generic")

        async with token_server(answers) as (token_url, asked), raw_server(handler) as url:
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", service_account(token_url))
            config = fast_config(url, auth="google", **overrides)
            async with JudgeClient(config) as judge:
                outcomes = [await judge.label(pairs) for pairs in calls]
            return [o for call in outcomes for o in call], seen, asked

    return asyncio.run(run())


def test_token_is_fetched_once_and_renewed_before_it_expires(
    service_account, fast_config, monkeypatch, pairs_of
):
    calls = [pairs_of(8), pairs_of(1, 8), pairs_of(8, 9)]
    answers = [token("first", 60), token("second", 3600)]  # 60 s is inside google-auth's margin
    outcomes, seen, asked = run_judge(answers, service_account, fast_config, monkeypatch, calls)
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)
    assert len(outcomes) == len(seen) == 17
    assert seen[-9:] == ["Bearer second"] * 9
    assert len(asked) == 2
    assert asked[0].endswith("jwt-bearer")


def test_token_server_out_pauses_and_goes_on(service_account, fast_config, monkeypatch, pairs_of):
    answers = [None, None, token("late", 3600)]
    outcomes, seen, asked = run_judge(
        answers, service_account, fast_config, monkeypatch, [pairs_of(3)]
    )
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)
    assert set(seen) == {"Bearer late"}
    assert len(asked) == 3


def test_token_server_gone_stops_within_the_pause_budget(
    service_account, fast_config, monkeypatch, pairs_of
):
    with pytest.raises(JudgeDownError, match="no token just now"):
        run_judge(
            [None], service_account, fast_config, monkeypatch, [pairs_of(2)], pause_budget_s=0.3
        )


def test_refused_account_stops_at_once(service_account, fast_config, monkeypatch, pairs_of):
    refused = 400, {"error": "invalid_grant", "error_description": "account not found"}
    with pytest.raises(JudgeError, match=r"account not found.*gcloud auth") as info:
        run_judge([refused], service_account, fast_config, monkeypatch, [pairs_of(2)])
    assert not isinstance(info.value, JudgeDownError)


def test_no_credentials_says_what_to_set(service_account, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(JudgeError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        asyncio.run(GoogleToken()())


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(ValueError, match=r"speciarl-jax\[gcp\]"):
        GoogleToken()
