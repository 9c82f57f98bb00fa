"""The local judge's HTTP side: an OpenAI-compatible aiohttp application, faults included.

Routes: POST /v1/chat/completions, GET /v1/models, GET /health, GET /stats.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from aiohttp import web

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.offline.lies import LIE_ROUTE, LIES, lie, mislabel
from speciarl_jax.judge.parse import BINARY_NAMES
from speciarl_jax.judge.remote.prompt import batch_ids, read_payload
from speciarl_jax.types import Category, JsonObject, JsonValue

MODEL_NAME = "taxonomy"
# Replies of the fault `enum`.
_NO_CATEGORIES = ("very specific", "maybe", "specific or generic", "", "WRONG!!", "species")


@runtime_checkable
class PairJudge(Protocol):
    """A pure function from a pair to a category, such as `TaxonomyJudge`."""

    def category(self, ground_truth: str, answer: str) -> Category:
        """Label of one pair; `JudgeError` if it cannot be judged."""


class JudgeApp:
    """Request handlers around one `PairJudge`."""

    def __init__(self, judge: PairJudge, faults: FaultPlan | None = None) -> None:
        """Prepares the handlers; without `faults` the server is honest."""
        self._judge = judge
        self._plan = faults
        self._fault_rng = random.Random(faults.seed if faults else 0)
        self._enum_rng = random.Random(0)
        self._counts: collections.Counter[str] = collections.Counter()
        self._answered: collections.Counter[Pair] = collections.Counter()

    def build(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=4 * 2**20)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post(LIE_ROUTE, self._lie)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/stats", self._stats)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "speciarl"}
        return web.json_response({"object": "list", "data": [model]})

    async def _stats(self, request: web.Request) -> web.Response:
        """Requests and faults by kind, pairs answered, and pairs answered more than once."""
        again = sum(count > 1 for count in self._answered.values())
        body = {**self._counts, "distinct_pairs": len(self._answered), "answered_again": again}
        return web.json_response(body)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self._counts["requests"] += 1
        fault = ""
        if self._plan is not None:
            fault = self._plan.fault(self._fault_rng)
            await asyncio.sleep(self._plan.latency_s(self._fault_rng))
        self._counts[f"fault_{fault}" if fault else "answered"] += 1
        if fault and fault != "enum" and fault not in LIES:
            return await self._fail(fault, request)
        try:
            body = await request.json()
        except ValueError:
            return _error(400, "the body is not JSON")
        if not isinstance(body, dict):
            return _error(400, "the body is not a JSON object")
        try:
            text = (
                self._enum_rng.choice(_NO_CATEGORIES)
                if fault == "enum"
                else self._reply(body, fault)
            )
        except JudgeError as error:
            return _error(422, str(error))
        if fault not in LIES:
            return web.json_response(_completion(text, body))
        return await lie(fault, request, _completion(text, body), self._fault_rng)

    async def _lie(self, request: web.Request) -> web.Response:
        """Where the fault `307` leads: wrong labels for whoever follows."""
        body = await request.json()
        return web.json_response(mislabel(_completion(self._reply(body, "307"), body)))

    def _reply(self, body: JsonObject, fault: str) -> str:
        """The text a judge model would write, in the form the request constrains it to."""
        found = read_payload(body.get("messages"))
        choices = _choices(body)
        if found is None:
            return choices[0] if choices else "no pair found in the last line of the last message"
        pairs, is_batch = found
        categories = [self._judge.category(pair.ground_truth, pair.answer) for pair in pairs]
        is_told = fault in ("", "twice")
        if self._plan is not None and is_told:  # equal texts are the client's probe
            self._answered.update(pair for pair in pairs if pair.ground_truth != pair.answer)
        is_binary = bool(choices) and set(choices) == set(BINARY_NAMES)
        names = [_spell(category, is_binary or _asks_binary(body)) for category in categories]
        if is_batch and _asks_ids(body):
            return json.dumps(dict(zip(batch_ids(len(names)), names, strict=True)))
        match body:
            case {"response_format": {"type": "json_schema"}}:
                return json.dumps({"categories": names} if is_batch else {"category": names[0]})
        return json.dumps(names) if is_batch else names[0]

    async def _fail(self, fault: str, request: web.Request) -> web.StreamResponse:
        """Plays one fault."""
        assert self._plan is not None
        if fault.isdigit():
            headers = {"Retry-After": f"{self._plan.retry_after:g}"}
            has_wait = fault in ("429", "503")
            return _error(int(fault), "injected fault", headers if has_wait else None)
        if fault == "garbage":
            return web.Response(body=b"\xff\xfe<html>garbage", content_type="application/json")
        if fault == "hang":
            await asyncio.sleep(3600)
        response: web.StreamResponse
        if fault == "half":
            response = web.StreamResponse(
                headers={"Content-Type": "application/json", "Content-Length": "400"}
            )
            await response.prepare(request)
            await response.write(b'{"id": "half", "choices": [{"message": {"content": "spec')
        else:
            response = web.Response()
        if request.transport is not None:  # closed without the end of the answer
            request.transport.abort()
        return response


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """An error body of the OpenAI shape."""
    body = {"error": {"message": message, "type": "judge_error", "code": status}}
    return web.json_response(body, status=status, headers=headers)


def _spell(category: Category, is_binary: bool) -> str:
    """The category in the vocabulary that was asked for."""
    if not is_binary:
        return category.label
    return "correct" if category >= Category.SPECIFIC else "incorrect"


def _choices(body: JsonObject) -> list[str]:
    """The names the request allows, whichever way it says so."""
    match body:
        case {"structured_outputs": {"choice": [*choices]}} | {"guided_choice": [*choices]}:
            return [str(choice) for choice in choices]
        case {"response_format": {"type": "json_schema", "json_schema": schema}}:
            return [json.dumps({"category": name}) for name in _first_enum(schema)]
    return []


def _first_enum(schema: JsonValue) -> list[str]:
    """The first `enum` found in a JSON schema, outermost first."""
    queue = [schema]
    for item in queue:
        if isinstance(item, dict):
            names = item.get("enum")
            if isinstance(names, list):
                return [str(name) for name in names]
            queue.extend(item.values())
    return []


def _asks_binary(body: JsonObject) -> bool:
    """True if the instructions know the binary vocabulary only."""
    match body:
        case {"messages": [{"content": str(text)}, *_]}:
            return "incorrect" in text and "less_specific" not in text
    return False


def _asks_ids(body: JsonObject) -> bool:
    """True if the reply to a batch is to be an object by id: as the instructions say it."""
    match body:
        case {"messages": [{"content": str(text)}, *_]}:
            return "under the id of each pair" in " ".join(text.split())
    return False


def _completion(text: str, body: JsonObject) -> JsonObject:
    """A chat completion object with a rough token count."""
    messages = body.get("messages")
    prompt_tokens = sum(len(str(m)) for m in messages) // 4 if isinstance(messages, list) else 0
    reply_tokens = max(1, len(text) // 4)
    message = {"role": "assistant", "content": text}
    return {
        "id": f"judge-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": str(body.get("model", MODEL_NAME)),
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": reply_tokens,
            "total_tokens": prompt_tokens + reply_tokens,
        },
    }


@contextlib.asynccontextmanager
async def serve(
    judge: PairJudge, port: int = 0, faults: FaultPlan | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[str]:
    """Serves `judge` in this event loop while the context is open; `port` 0 takes a free one.

    Yields:
        The base URL, up to and including `/v1`.

    Raises:
        OSError: the port is taken.
    """
    runner = web.AppRunner(
        JudgeApp(judge, faults).build(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        yield f"http://{host}:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
