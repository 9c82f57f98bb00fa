"""Judge prompts: versioned files, a registry, and the safe way to put untrusted text in one.

A prompt file is TOML: `name`, `labels` (six_way | binary), `form` (single | batch |
batch_by_id), `system`,
`user` and a list of `[[examples]]`. The user message ends with `{payload}`, which is replaced by
one line of JSON. Untrusted text is normalised, cut to a length and JSON-encoded, so it holds no
quote, brace or newline and cannot end the line it stands on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.parse import BINARY_NAMES, json_or_none
from speciarl_jax.types import Category, JsonValue

PROMPT_DIR = Path(__file__).parent / "prompts"
_PAYLOAD = "{payload}"
_FIELDS = {"name", "labels", "form", "system", "user", "examples"}
_CHOICES = {"labels": ("six_way", "binary"), "form": ("single", "batch", "batch_by_id")}


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """One wording of the question.

    Attributes:
        name: file stem; versions are separate files (`six_way_v1`, `six_way_v2`).
        is_binary: the judge answers correct / incorrect instead of one of six categories.
        is_batch: several pairs a request, a JSON list of names back; see `has_ids`.
        has_ids: a batch whose reply is an object from the pairs' ids to names, so that a reply in
            another order is read right and one that lacks a pair is not read at all.
        system: system message, few-shot examples included.
        user: user message, ends with the payload's place holder.
        fingerprint: hash of the whole wording; part of every cache key.
    """

    name: str
    is_binary: bool
    is_batch: bool
    system: str
    user: str
    fingerprint: str
    has_ids: bool = False

    @property
    def labels(self) -> list[str]:
        """The names the judge may answer with."""
        return list(BINARY_NAMES) if self.is_binary else [category.label for category in Category]

    def messages(self, pairs: Sequence[Pair]) -> list[dict[str, str]]:
        """Chat messages that ask about `pairs`, which are normalised already.

        Raises:
            ValueError: a single-form prompt got another number of pairs than one.
        """
        if not self.is_batch and len(pairs) != 1:
            raise ValueError(
                f"prompt {self.name}: expected 1 pair, got {len(pairs)}; use a batch prompt"
            )
        user = self.user.replace(_PAYLOAD, encode_payload(pairs, self.is_batch))
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def encode_payload(pairs: Sequence[Pair], is_batch: bool) -> str:
    """One line of ASCII JSON: an object for a single pair, a list of objects for a batch."""
    items = [{"ground_truth": pair.ground_truth, "answer": pair.answer} for pair in pairs]
    if not is_batch:
        return json.dumps(items[0])
    return json.dumps([{"id": number, **item} for number, item in enumerate(items, start=1)])


def batch_ids(count: int) -> list[str]:
    """The ids under which `encode_payload` numbers the pairs of a batch."""
    return [str(number) for number in range(1, count + 1)]


def read_payload(messages: JsonValue) -> tuple[list[Pair], bool] | None:
    """The pairs in a chat request made by `JudgePrompt.messages`, and whether it is a batch.

    Only the last line of the last message counts: JSON text never holds a newline, so untrusted
    text cannot make a line of its own.

    Returns:
        None if the request does not carry a payload of that shape.
    """
    match messages:
        case [*_, {"content": str(content)}]:
            value = json_or_none(content.rsplit("\n", 1)[-1])
        case _:
            return None
    pairs = []
    for item in value if isinstance(value, list) else [value]:
        match item:
            case {"ground_truth": str(truth), "answer": str(answer)}:
                pairs.append(Pair(truth, answer))
            case _:
                return None
    return pairs, isinstance(value, list)


def prompt_names() -> list[str]:
    """Names of the prompts that ship with the package."""
    return sorted(path.stem for path in PROMPT_DIR.glob("*.toml"))


@functools.lru_cache(maxsize=64)
def load_prompt(name: str) -> JudgePrompt:
    """Loads a prompt by registered name, or by the path of a `.toml` file of the same form.

    Raises:
        ValueError: no such prompt, a field missing or unknown, or a user message that does not
            end with the payload on a line of its own.
    """
    path = Path(name) if name.endswith(".toml") else PROMPT_DIR / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(prompt_names())
        raise ValueError(
            f"judge.prompt={name!r}: no such prompt; expected one of {known} or a .toml file"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"judge prompt {path}: not valid TOML: {error}") from error
    if set(raw) != _FIELDS:
        odd = ", ".join(sorted(set(raw) ^ _FIELDS))
        raise ValueError(f"judge prompt {path}: fields missing or unknown: {odd}")
    for field, allowed in _CHOICES.items():
        if raw[field] not in allowed:
            raise ValueError(f"judge prompt {path}: {field}={raw[field]!r}; expected {allowed}")
    user = raw["user"].strip()
    if not user.endswith("\n" + _PAYLOAD) or user.count(_PAYLOAD) != 1:
        raise ValueError(f"judge prompt {path}: user must end with a line holding only {_PAYLOAD}")
    is_batch = raw["form"] != "single"
    shots = "\n".join(
        encode_payload([Pair(item["ground_truth"], item["answer"])], is_batch=False)
        + f" -> {item['category']}"
        for item in raw["examples"]
    )
    system = raw["system"].strip() + (f"\n\nExamples:\n{shots}" if shots else "")
    has_ids = raw["form"] == "batch_by_id"
    parts = [system, user, raw["labels"], is_batch, *([raw["form"]] if has_ids else [])]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return JudgePrompt(
        raw["name"], raw["labels"] == "binary", is_batch, system, user, digest, has_ids
    )
