"""From completion to answer, from answer to judge text, from judge reply to category."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from speciarl_jax.types import Category, JsonValue

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# Python's \w is letters, numbers and the underscore; the rest of the class is Unicode's Pd.
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u2e5d\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d\U00010ead"
)
_NOT_KEPT = re.compile(rf"(?:[^\w\s{_DASHES}]|_)+")
_ASCII_TABLE = {
    code: chr(code).lower() if chr(code).isalnum() or chr(code) == "-" else " "
    for code in range(128)
}
_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_WRAPPING = " \t\r\n\"'`*"
_NAMES = {category.label.replace("_", mark): category for category in Category for mark in "_ -"}
BINARY_NAMES = {"correct": Category.SPECIFIC, "incorrect": Category.WRONG}


def normalize(text: str) -> str:
    """Text as the judge sees it: NFC, letters, numbers, dashes and single spaces, lower case.

    Every character that is not a letter, a number, dash punctuation or white space becomes a
    space, so no quote, brace, tag or newline survives; then lower case, white space collapsed
    and stripped. The result may be empty, which the caller treats as a format failure.

    Source: SpeciaRL released code, text cleaning before the judge (method.md section 1).
    """
    if text.isascii():
        return " ".join(text.translate(_ASCII_TABLE).split())
    kept = _NOT_KEPT.sub(" ", unicodedata.normalize("NFC", text))
    return " ".join(kept.lower().split())


def fold(text: str) -> str:
    """Text compared without regard to case: NFC, casefolded, white space collapsed.

    Unlike `normalize` it keeps every mark: C++ is not C#, and a vowel sign is part of its word.
    Control characters become spaces.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join("".join(char if char.isprintable() else " " for char in plain).split())


def extract_answer(completion: str) -> str | None:
    """The policy's answer: the first `<answer>…</answer>`, stripped.

    Returns:
        The raw text between the tags, or None (a format failure) if there is no such element
        or if nothing of it is left after `normalize`.

    Source: SpeciaRL released code, format reward; the emptiness rule is method.md section 1.
    """
    match = _ANSWER.search(completion)
    if match is None:
        return None
    answer = match.group(1).strip()
    return answer if normalize(answer) else None


def _lookup(text: JsonValue, is_binary: bool) -> Category | None:
    """One name, bare: quotes, emphasis and one full stop around it are forgiven."""
    names = BINARY_NAMES if is_binary else _NAMES
    if not isinstance(text, str):
        return None
    bare = text.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING)
    return names.get(" ".join(bare.lower().split()))


def strict_json(text: str | bytes) -> JsonValue:
    """`text` parsed as JSON in which no object says a thing twice.

    Raises:
        ValueError: no JSON, a key given twice, or nested too deeply; one short line.
    """
    try:
        value: JsonValue = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _without_duplicates(items: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """A JSON object; two values under one key contradict each other, and neither is believed."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("an object has a key twice")
    return found


def json_or_none(text: str) -> JsonValue:
    """`text` parsed by `strict_json`; None if it is `null` or refused."""
    try:
        return strict_json(text)
    except ValueError:
        return None


def parse_category(reply: str, is_binary: bool = False) -> Category | None:
    """Reads a judge's reply strictly: it must be exactly one category name and nothing else.

    Accepted: the name in any case, with underscore, space or dash, with quotes or a full stop
    around it, or as the JSON object `{"category": name}`; a leading `<think>` block is dropped.
    A reply that names two categories, or explains itself, is not a label.

    Args:
        reply: the text the judge's model wrote.
        is_binary: the prompt asked for `correct` / `incorrect`; these count as specific / wrong.
    """
    text = _THINKING.sub("", reply).strip()
    if text.startswith("{"):
        value = json_or_none(text)
        if not isinstance(value, dict) or set(value) != {"category"}:
            return None
        return _lookup(value["category"], is_binary)
    return _lookup(text, is_binary)


def parse_batch(reply: str, count: int, is_binary: bool = False) -> list[Category] | None:
    """Reads the reply to a batch prompt: a JSON list of exactly `count` names.

    The list may be wrapped as `{"categories": [...]}`, the form a JSON schema asks for.

    Returns:
        The categories in the order asked, or None if anything is missing, extra or unknown.
    """
    value = json_or_none(_THINKING.sub("", reply).strip())
    if isinstance(value, dict) and set(value) == {"categories"}:
        value = value["categories"]
    if not isinstance(value, list) or len(value) != count:
        return None
    found = [_lookup(item, is_binary) for item in value]
    labels = [category for category in found if category is not None]
    return labels if len(labels) == count else None


def parse_batch_by_id(
    reply: str, ids: Sequence[str], is_binary: bool = False
) -> list[Category] | None:
    """Reads the reply to a batch prompt with ids: a JSON object from each id to a name.

    Returns:
        The categories in the order of `ids`, or None if an id is missing, unknown or given twice,
        or a name is unknown.
    """
    value = json_or_none(_THINKING.sub("", reply).strip())
    if not isinstance(value, dict) or set(value) != set(ids):
        return None
    found = [_lookup(value[name], is_binary) for name in ids]
    labels = [category for category in found if category is not None]
    return labels if len(labels) == len(ids) else None
