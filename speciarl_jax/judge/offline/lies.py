"""Replies that must not be believed, on purpose: what a broken gateway makes of an honest one.

Where such a reply holds a label it is a wrong one, so that a drill sees any that is believed.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import gzip
import json
import random
import re

from aiohttp import web

from speciarl_jax.judge.parse import BINARY_NAMES
from speciarl_jax.types import Category, JsonObject

LIES = ("deep", "flood", "307", "bomb", "disown", "choices", "twice")
LIE_ROUTE = "/v1/lie/chat/completions"
_LABELS = [category.label for category in Category]
_OTHER = dict(zip(_LABELS, [*_LABELS[1:], _LABELS[0]], strict=True))
_OTHER |= dict(zip(BINARY_NAMES, reversed(list(BINARY_NAMES)), strict=True))
_NAME = re.compile(r"[a-z_]+")
_FLOOD_BYTES, _BOMB_BYTES, _DEPTH = 2**20, 10 * 2**20, 100_000


def mislabel(completion: JsonObject) -> JsonObject:
    """The same completion with another label for each of its labels."""
    wrong = copy.deepcopy(completion)
    match wrong:
        case {"choices": [{"message": dict(message)}]}:
            text = str(message["content"])
            message["content"] = _NAME.sub(lambda m: _OTHER.get(m[0], m[0]), text)
    return wrong


def disown(completion: JsonObject, rng: random.Random) -> JsonObject:
    """A wrong label, and a sign that its sender does not stand by it."""
    wrong = mislabel(completion)
    sign = rng.choice(("refusal", "role", "finish_reason", "error"))
    if sign == "error":
        wrong["error"] = {"message": "upstream failed"}
        return wrong
    match wrong:
        case {"choices": [dict(choice)]} if sign == "finish_reason":
            choice[sign] = "content_filter"
        case {"choices": [{"message": dict(message)}]}:
            message[sign] = "user"  # a refusal or a role
    return wrong


async def lie(
    fault: str, request: web.Request, completion: JsonObject, rng: random.Random
) -> web.StreamResponse:
    """Plays a fault of `LIES` where `completion` would be the honest reply."""
    if fault == "deep":
        return _json_response(b"[" * _DEPTH)
    if fault == "flood":
        return _json_response(b" " * _FLOOD_BYTES + json.dumps(mislabel(completion)).encode())
    if fault == "307":
        return web.Response(status=307, headers={"Location": LIE_ROUTE})
    if fault == "bomb":
        return _json_response(_bomb(), {"Content-Encoding": "gzip"})
    if fault == "disown":
        return web.json_response(disown(completion, rng))
    if fault == "choices":
        wrong = mislabel(completion)
        match completion, wrong:
            case {"choices": [first]}, {"choices": [second]}:
                wrong["choices"] = [first, second]
        return web.json_response(wrong)
    response = _json_response(json.dumps(completion).encode())
    await response.prepare(request)
    await response.write_eof()
    # At once, or when the connection may be in use again: then only its id tells whose it is.
    await asyncio.sleep(rng.choice((0.0, 0.005)))
    if request.transport is not None:
        body = json.dumps(mislabel(completion)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        request.transport.write(head.encode() + b"\r\n\r\n" + body)
    return response


def _json_response(body: bytes, headers: dict[str, str] | None = None) -> web.Response:
    """Bytes that call themselves JSON."""
    return web.Response(body=body, content_type="application/json", headers=headers)


@functools.lru_cache(maxsize=1)
def _bomb() -> bytes:
    """A few kilobytes that unpack to many megabytes, with a label at their end."""
    message = {"role": "assistant", "content": Category.MORE_SPECIFIC.label}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return gzip.compress(b" " * _BOMB_BYTES + json.dumps({"choices": [choice]}).encode())
