"""Files of pairs: JSON lines in, JSON lines with outcomes out."""

from __future__ import annotations

import json
from pathlib import Path

from speciarl_jax.judge.base import Outcome
from speciarl_jax.types import Verdict


def read_pairs(path: str) -> list[dict[str, str]]:
    """Objects with `ground_truth` and `answer` (and `category`, if they are labelled).

    Raises:
        ValueError: the file is missing or holds no pair, or a line is not of that form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            texts = item["ground_truth"], item["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = (None, None)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path} line {number}: expected an object with ground_truth, answer")
        items.append(item)
    if not items:
        raise ValueError(f"{path}: holds no pair; expected objects with ground_truth, answer")
    return items


def outcome_json(outcome: Outcome) -> dict[str, str | None]:
    """An outcome as the fields `category`, `judge` and `failure`."""
    if isinstance(outcome, Verdict):
        return {"category": outcome.category.label, "judge": outcome.judge, "failure": None}
    return {"category": None, "judge": None, "failure": f"{outcome.kind.value}: {outcome.message}"}
