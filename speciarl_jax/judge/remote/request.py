"""One request to an OpenAI-compatible server: how it is constrained, and how it is sent."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.judge.base import Pair, TokenError
from speciarl_jax.judge.parse import parse_batch, parse_batch_by_id, parse_category, strict_json
from speciarl_jax.judge.remote.http import Http, HttpReply
from speciarl_jax.judge.remote.prompt import JudgePrompt, batch_ids
from speciarl_jax.judge.remote.reply import (
    AskError,
    Reply,
    classify,
    classify_status,
    hide,
    read_reply,
)
from speciarl_jax.types import Category, FailureKind, JsonObject, JsonValue

CONSTRAINTS = ("choice", "json_schema", "grammar", "none")
REPLY_MAX_BYTES = 64 * 2**10  # of a reply, for each pair asked
MODELS_MAX_BYTES = 4 * 2**20
_ARRAY: JsonObject = {"type": "array"}
_NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


class HungError(TimeoutError):
    """A request was given up because another one found the endpoint silent."""


def build_body(
    config: JudgeConfig, prompt: JudgePrompt, pairs: Sequence[Pair], constraint: str, thinking: str
) -> JsonObject:
    """The JSON body of a chat completion request that asks about `pairs`."""
    body: JsonObject = {
        "model": config.model_name,
        "messages": prompt.messages(pairs),
        "temperature": config.temperature,
        "max_tokens": config.max_reply_tokens * len(pairs),
    }
    body.update(_NO_THINKING if thinking == "off" else {})
    body.update(_constrain(constraint, prompt, len(pairs)))
    return body


def _constrain(constraint: str, prompt: JudgePrompt, count: int) -> JsonObject:
    """The fields that hold the model to the label names."""
    if constraint == "choice":
        # vLLM since 0.11 and before; either ignores the other's spelling.
        return {"structured_outputs": {"choice": prompt.labels}, "guided_choice": prompt.labels}
    if constraint == "grammar":
        return {"grammar": _grammar(prompt, count)}
    if constraint == "json_schema":
        schema: JsonObject = {"name": "verdict", "strict": True, "schema": _schema(prompt, count)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {}


def _schema(prompt: JudgePrompt, count: int) -> JsonObject:
    """JSON schema of the reply: one name, a list of exactly `count` names, or one for each id."""
    label: JsonObject = {"type": "string", "enum": prompt.labels}
    fields: dict[str, JsonValue] = {"category": label}
    if prompt.has_ids:
        fields = dict.fromkeys(batch_ids(count), label)
    elif prompt.is_batch:
        fields = {"categories": {**_ARRAY, "items": label, "minItems": count, "maxItems": count}}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def _grammar(prompt: JudgePrompt, count: int) -> str:
    """GBNF (llama.cpp) for one bare name, a JSON list of `count` names, or an object by id."""
    if not prompt.is_batch:
        return "root ::= " + " | ".join(json.dumps(label) for label in prompt.labels)
    item = " | ".join(json.dumps(json.dumps(label)) for label in prompt.labels)
    if prompt.has_ids:
        parts = [f"{json.dumps(json.dumps(name) + ': ')} label" for name in batch_ids(count)]
        opening, closing = "{", "}"
    else:
        parts = ["label"] * count
        opening, closing = "[", "]"
    items = ' ", " '.join(parts)
    return f'root ::= "{opening}" {items} "{closing}"\nlabel ::= {item}'


def read_labels(prompt: JudgePrompt, reply: Reply, count: int) -> list[Category] | None:
    """The labels in a reply, or None if it is not exactly what was asked for."""
    if reply.flaw:
        return None
    if prompt.has_ids:
        return parse_batch_by_id(reply.text, batch_ids(count), prompt.is_binary)
    if prompt.is_batch:
        return parse_batch(reply.text, count, prompt.is_binary)
    category = parse_category(reply.text, prompt.is_binary)
    return None if category is None else [category]


class Door:
    """Where requests go in: the connections, an endpoint's address, and its key."""

    def __init__(self, http: Http, url: str, key: Callable[[], Awaitable[str]] | str) -> None:
        """Describes an endpoint.

        Args:
            url: base URL up to `/v1`.
            key: the API key, or a function that gives a valid one.
        """
        self.http = http
        self.url = url.rstrip("/")
        self._key = key
        self._heard_at = -math.inf  # when the last response came, whatever it said
        self._waiting: set[asyncio.Timeout] = set()

    async def ask(
        self, route: str, timeout_s: float, max_bytes: int, body: bytes | None = None
    ) -> tuple[HttpReply, Callable[[str], str]]:
        """One exchange; with the reply comes the function that takes the key out of a text.

        Raises:
            TimeoutError: no whole reply in time.
            HungError: somebody else has found out that this endpoint answers nobody.
            aiohttp.ClientError: the connection cannot be made, or breaks.
            JudgeError: there is no key to be had.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._waiting.add(limit)
                key = self._key if isinstance(self._key, str) else await self._key()
                headers = {"Authorization": f"Bearer {key}"}
                found = await self.http.exchange(f"{self.url}{route}", headers, max_bytes, body)
        except TimeoutError:
            if time.monotonic() - started < timeout_s:
                raise HungError from None
            raise
        finally:
            self._waiting.discard(limit)
        self._heard_at = time.monotonic()
        return found, functools.partial(hide, key)

    def is_hung(self, timeout_s: float) -> bool:
        """True if nothing at all was heard for as long as a request may take."""
        return time.monotonic() - self._heard_at >= timeout_s

    def give_up(self) -> None:
        """Ends every request under way: one of them has waited for all."""
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())


async def send(door: Door, body: JsonObject, timeout_s: float, num_pairs: int) -> Reply | AskError:
    """Sends one chat completion request and reads the reply; every failure is a value.

    Args:
        num_pairs: pairs asked, which bound the size of the reply.

    Raises:
        JudgeError: there is no key to be had.
    """
    data = json.dumps(body).encode()
    max_bytes = num_pairs * REPLY_MAX_BYTES
    try:
        found, hidden = await door.ask("/chat/completions", timeout_s, max_bytes, data)
    except TokenError as error:
        return AskError(FailureKind.REFUSED, str(error), is_hard=True, is_of_endpoint=True)
    except HungError:
        message = f"the endpoint has answered nobody for {timeout_s:g} s"
        return AskError(FailureKind.TIMEOUT, message, is_hard=True, is_of_endpoint=True)
    except TimeoutError:
        if is_hung := door.is_hung(timeout_s):
            door.give_up()
        return AskError(FailureKind.TIMEOUT, f"no reply within {timeout_s:g} s", is_hard=is_hung)
    except (aiohttp.ClientError, OSError) as error:
        return classify(error)
    if found.status != 200:
        return classify_status(found, hidden)
    return read_reply(found.body, hidden)


async def list_models(door: Door, timeout_s: float) -> list[str]:
    """The names under which an endpoint serves models; empty if it does not say.

    Raises:
        JudgeError: there is no key to be had.
    """
    try:
        found, hidden = await door.ask("/models", timeout_s, MODELS_MAX_BYTES)
        value = strict_json(found.body)
    except (aiohttp.ClientError, OSError, ValueError, TokenError):
        return []
    match value:
        case {"data": [*items]}:
            names = [item.get("id") for item in items if isinstance(item, dict)]
            return [hidden(name)[:100] for name in names if isinstance(name, str)]
    return []
