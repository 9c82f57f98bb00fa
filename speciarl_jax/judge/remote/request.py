"""One request to an OpenAI-compatible server: how it is constrained, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import json
import math
import time
from collections.abc import Mapping, Sequence

import aiohttp
import openai

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.judge.base import Pair, TokenError
from speciarl_jax.judge.parse import parse_batch, parse_category
from speciarl_jax.judge.remote.prompt import JudgePrompt
from speciarl_jax.types import Category, FailureKind, JsonObject

CONSTRAINTS = ("choice", "json_schema", "grammar", "none")
RETRY_AFTER_MAX_S = 60.0  # a longer Retry-After sets the endpoint aside that long
_NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_HARD_STATUS = frozenset({401, 403, 404})


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the judge's model wrote, and what it cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class AskError:
    """A request that brought no reply.

    Attributes:
        kind: typed reason.
        message: one line.
        is_retryable: asking the same again may help.
        is_hard: the endpoint as a whole seems out (refused connection, refused key, no such model);
            a probe decides.
        is_of_endpoint: certainly the endpoint and not the pair (refused connection, refused key):
            costs the pair no retry. 403 and 404 may be a gateway's rule against one text.
        retry_after_s: what the server asked us to wait; 0 if it did not say.
    """

    kind: FailureKind
    message: str
    is_retryable: bool = True
    is_hard: bool = False
    is_of_endpoint: bool = False
    retry_after_s: float = 0.0


def build_body(
    config: JudgeConfig, prompt: JudgePrompt, pairs: Sequence[Pair], constraint: str, thinking: str
) -> JsonObject:
    """The JSON body of a chat completion request that asks about `pairs`."""
    body: JsonObject = {
        "model": config.model,
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
    """JSON schema of the reply: one name, or a list of exactly `count` names."""
    label: JsonObject = {"type": "string", "enum": prompt.labels}
    field, value = "category", label
    if prompt.is_batch:
        field = "categories"
        value = {"type": "array", "items": label, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {field: value},
        "required": [field],
        "additionalProperties": False,
    }


def _grammar(prompt: JudgePrompt, count: int) -> str:
    """GBNF (llama.cpp) for one bare name, or for a JSON list of `count` names."""
    if not prompt.is_batch:
        return "root ::= " + " | ".join(json.dumps(label) for label in prompt.labels)
    item = " | ".join(json.dumps(json.dumps(label)) for label in prompt.labels)
    items = ' ", " '.join(["label"] * count)
    return f'root ::= "[" {items} "]"\nlabel ::= {item}'


def read_labels(prompt: JudgePrompt, reply: Reply, count: int) -> list[Category] | None:
    """The labels in a reply, or None if it is not exactly what was asked for."""
    if prompt.is_batch:
        return parse_batch(reply.text, count, prompt.is_binary)
    category = parse_category(reply.text, prompt.is_binary)
    return None if category is None else [category]


async def send(client: openai.AsyncOpenAI, body: JsonObject, timeout_s: float) -> Reply | AskError:
    """Sends one request and reads the reply; every failure comes back as a value.

    `client.post` instead of `chat.completions.create`: the latter walks the messages through
    typing tables, which took 40 % of the client's time.
    """
    try:
        async with asyncio.timeout(timeout_s):  # openai's own limit restarts with each read
            content = await client.post(
                "/chat/completions", cast_to=str, body=body, options={"timeout": timeout_s}
            )
    except openai.APIError as error:
        return classify(error)
    except TokenError as error:
        return AskError(FailureKind.REFUSED, str(error), is_hard=True, is_of_endpoint=True)
    except TimeoutError:
        return AskError(FailureKind.TIMEOUT, f"no reply within {timeout_s:g} s")
    except (OSError, aiohttp.ClientError) as error:
        return AskError(FailureKind.SERVER, f"connection broke: {type(error).__name__} {error}")
    return _read_reply(content)


def _read_reply(content: str) -> Reply | AskError:
    """Takes the text out of a chat completion."""
    try:
        value = json.loads(content)
        text = value["choices"][0]["message"]["content"]
        usage = value.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return AskError(FailureKind.SERVER, f"reply is no chat completion: {content[:80]!r}")
    return Reply(text if isinstance(text, str) else "", *tokens)


def classify(error: openai.APIError) -> AskError:
    """Types an openai error.

    openai's aiohttp transport reports a refused and a reset connection as timeouts, so the chain
    of causes decides, not the class.
    """
    if isinstance(error, openai.APIStatusError):
        return _classify_status(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, aiohttp.ClientConnectorError | ConnectionRefusedError):
            message = f"connection refused: {cause}"
            return AskError(FailureKind.REFUSED, message, is_hard=True, is_of_endpoint=True)
        if isinstance(cause, aiohttp.ServerTimeoutError | TimeoutError):
            return AskError(FailureKind.TIMEOUT, f"timed out: {cause}")
        if isinstance(cause, aiohttp.ClientError | ConnectionError):
            return AskError(FailureKind.SERVER, f"connection broke: {type(cause).__name__} {cause}")
        cause = cause.__cause__
    if isinstance(error, openai.APITimeoutError):
        return AskError(FailureKind.TIMEOUT, str(error))
    return AskError(FailureKind.SERVER, str(error))


def _classify_status(error: openai.APIStatusError) -> AskError:
    """Types an HTTP status."""
    status = error.status_code
    message = f"HTTP {status}: {error.message}"
    if status in _HARD_STATUS:
        is_of_endpoint = status == 401  # a refused key
        return AskError(FailureKind.REFUSED, message, is_hard=True, is_of_endpoint=is_of_endpoint)
    kind = FailureKind.RATE_LIMITED if status == 429 else FailureKind.SERVER
    is_retryable = status >= 500 or status in _RETRYABLE_STATUS
    wait = parse_retry_after(error.response.headers)
    return AskError(kind, message, is_retryable, retry_after_s=wait)


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header (a number or a date); 0 if absent or not readable.

    Source: RFC 9110 section 10.2.3, and the `retry-after-ms` header of OpenAI and Azure.
    """
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) / divisor
            if math.isfinite(seconds):
                return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return max(0.0, date.timestamp() - time.time())
