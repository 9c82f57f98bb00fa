"""What came of a request: a reply, or a typed error; what a reply must be to be believed."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import functools
import math
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping

import aiohttp

from speciarl_jax.judge.parse import json_or_none, strict_json
from speciarl_jax.judge.remote.http import BadReplyError, HttpReply
from speciarl_jax.types import FailureKind, JsonObject, JsonValue

RETRY_AFTER_MAX_S = 60.0  # a longer Retry-After sets the endpoint aside that long
MOST_TOKENS = 10**9  # a usage above it is nonsense
NO_KEYS = ("", "none")  # what is sent as a key where none is needed
_RETRY_AFTER_DAY_S = 86_400.0
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_HARD_STATUS = frozenset({401, 403, 404})


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the judge's model wrote, and what it cost in tokens.

    Attributes:
        shown: the start of the text for messages, without the key if the server echoed it.
        flaw: why the text is no answer (cut off, filtered, a refusal); empty if it is one.
        id: the server's own name for the reply; empty if it gave none.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    shown: str = ""
    flaw: str = ""
    id: str = ""

    @property
    def trouble(self) -> str:
        """One clause for messages about a reply that is no label."""
        return self.flaw or f"replied {self.shown!r}, which is no category"


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


def hide(key: str, text: str) -> str:
    """`text` without the key, however it is spelled: plain, escaped, in a URL, in base64."""
    return text if key in NO_KEYS else _spellings(key).sub("[key]", text)


@functools.lru_cache(maxsize=8)
def _spellings(key: str) -> re.Pattern[str]:
    """Matches a key in which any mark may be escaped, once or more, and its base64."""
    marks = (
        char
        if char.isalnum()
        else rf"(?:\\*{re.escape(char)}|%{ord(char):02x}|\\+u{ord(char):04x})"
        for char in key
    )
    encoded = base64.b64encode(key.encode()).decode().rstrip("=")
    return re.compile("".join(marks) + "|" + re.escape(encoded), re.IGNORECASE)


def read_reply(content: bytes, hidden: Callable[[str], str] = str) -> Reply | AskError:
    """Takes the text out of a chat completion.

    A reply that disowns its own text is an error or has a flaw: an error beside the choices, no
    choice or several, a role that is not the assistant's, a refusal, an end before the end.

    Args:
        content: the response body.
        hidden: takes the key out of what is shown.
    """
    shown = hidden(content.decode("utf-8", "replace"))[:80]
    try:
        value = strict_json(content)
    except ValueError as error:
        return AskError(FailureKind.SERVER, f"reply is no JSON ({error}): {shown!r}")
    if not isinstance(value, dict):
        return AskError(FailureKind.SERVER, f"reply is no chat completion: {shown!r}")
    if value.get("error") is not None:
        reason = hidden(error_text(content))[:200]
        return AskError(FailureKind.SERVER, f"reply carries an error: {reason}")
    match value.get("choices"):
        case [{"message": dict(message), **choice}] if "content" in message:
            role = message.get("role")
        case [_, _, *rest]:
            return AskError(FailureKind.SERVER, f"reply has {2 + len(rest)} choices, not one")
        case _:
            return AskError(FailureKind.SERVER, f"reply is no chat completion: {shown!r}")
    if role not in (None, "assistant"):
        by = hidden(str(role))[:20]
        return AskError(FailureKind.SERVER, f"reply is by {by!r} and not by the assistant")
    text = message["content"] if isinstance(message["content"], str) else ""
    flaw = _flaw(choice, message, hidden)
    return Reply(text, *_read_usage(value.get("usage")), hidden(text)[:60], flaw, _id(value))


def _flaw(
    choice: Mapping[object, object],
    message: Mapping[str, JsonValue],
    hidden: Callable[[str], str],
) -> str:
    """Why the text of a reply is no answer, however much it looks like one; empty if it is."""
    if message.get("refusal") is not None:
        return "refused to answer"
    if choice.get("error") is not None:
        return "carries an error"
    end = choice.get("finish_reason")
    if end is None or (isinstance(end, str) and end.lower() == "stop"):
        return ""
    hint = ": raise judge.max_reply_tokens" if end == "length" else ""
    return f"ended by {hidden(str(end))[:40]!r} and not by itself{hint}"


def _read_usage(usage: JsonValue) -> tuple[int, int]:
    """Tokens of the prompt and of the reply; 0 where the server says nothing that can be true."""
    fields = usage if isinstance(usage, dict) else {}
    counts = [fields.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, reply = (
        int(count) if isinstance(count, int | float) and 0 <= count <= MOST_TOKENS else 0
        for count in counts
    )
    return prompt, reply


def _id(value: JsonObject) -> str:
    """The server's own name for a reply, cut to a length; empty if it gives none."""
    name = value.get("id")
    return name[:100] if isinstance(name, str) else ""


def classify(error: aiohttp.ClientError | OSError) -> AskError:
    """Types what the connection did."""
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
        message = f"connection refused: {error}"
        return AskError(FailureKind.REFUSED, message, is_hard=True, is_of_endpoint=True)
    if isinstance(error, BadReplyError):
        return AskError(FailureKind.SERVER, str(error))
    return AskError(FailureKind.SERVER, f"connection broke: {type(error).__name__} {error}")


def classify_status(reply: HttpReply, hidden: Callable[[str], str] = str) -> AskError:
    """Types a response whose status is not 200."""
    status = reply.status
    if 300 <= status < 400:
        to = hidden(_plain_url(reply.headers.get("Location", "")))
        message = (
            f"HTTP {status}: redirects to {to or 'nowhere'}, which is not followed; put the "
            "address that serves the judge itself into judge.endpoints"
        )
        return AskError(FailureKind.REFUSED, message, is_hard=True)
    message = f"HTTP {status}: {hidden(error_text(reply.body))[:200]}"
    if status in _HARD_STATUS:
        is_of_endpoint = status == 401  # a refused key
        return AskError(FailureKind.REFUSED, message, is_hard=True, is_of_endpoint=is_of_endpoint)
    kind = FailureKind.RATE_LIMITED if status == 429 else FailureKind.SERVER
    is_retryable = status < 400 or status >= 500 or status in _RETRYABLE_STATUS
    wait = parse_retry_after(reply.headers)
    return AskError(kind, message, is_retryable, retry_after_s=wait)


def _plain_url(text: str) -> str:
    """A URL without credentials, query and fragment, up to and without the route we ask for."""
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    path = parts.path.removesuffix("/chat/completions")
    return urllib.parse.urlunsplit((parts.scheme, host, path, "", ""))[:200]


def error_text(body: bytes) -> str:
    """What a server says about its refusal: `error.message` of the OpenAI shape, else the start."""
    match json_or_none(body.decode("utf-8", "replace")):
        case {"error": {"message": str(message)}} | {"error": str(message)}:
            return message
        case {"message": str(message)} | {"detail": str(message)}:
            return message
    return body[:2000].decode("utf-8", "replace")


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header (a number or a date); 0 if absent or not readable.

    Never more than a day: what is further off is no plan of the server's.

    Source: RFC 9110 section 10.2.3, and the `retry-after-ms` header of OpenAI and Azure.
    """
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) / divisor
            if not math.isnan(seconds):
                return min(max(0.0, seconds), _RETRY_AFTER_DAY_S)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = date.timestamp() - time.time()
    except (ValueError, OverflowError):  # OverflowError: a year or a zone of twenty digits
        return 0.0
    return min(max(0.0, seconds), _RETRY_AFTER_DAY_S)
