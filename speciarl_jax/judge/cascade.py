"""Pairs that need no model: equal but for case, or equal by a synonym table.

What is compared keeps its marks (`fold`), for the cleaned text that a judge sees drops them:
C++ and C# are one text to it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.parse import fold, normalize


class Cascade:
    """The synonym table; an exact match needs none."""

    def __init__(self, synonyms: str = "") -> None:
        """Reads a synonym table: CSV rows or a JSON list of lists; names of a row are equal.

        Args:
            synonyms: path of the table; empty for none.

        Raises:
            JudgeError: the file is missing, not of that form, or a name is empty.
        """
        self._groups: dict[str, set[int]] = {}  # folded name -> rows that hold it
        for number, names in enumerate(_read_rows(Path(synonyms)) if synonyms else (), start=1):
            for name in names:
                if not normalize(name):
                    raise JudgeError(
                        f"synonyms {synonyms} row {number}: the name {name!r} is empty"
                    )
                self._groups.setdefault(_plain(name), set()).add(number)

    def synonyms(self, raw: Sequence[Pair], seen: Sequence[Pair]) -> frozenset[Pair]:
        """Those of the pairs `seen` by a judge that the table calls equal, however spelled here.

        Args:
            raw: the pairs before cleaning, in the order of `seen`.
        """
        if not self._groups:
            return frozenset()
        unlike = {pair for said, pair in zip(raw, seen, strict=True) if not self.is_synonym(said)}
        return frozenset(seen) - unlike

    def is_synonym(self, raw: Pair) -> bool:
        """True if a row of the table holds both raw texts; names may have underscores."""
        rows = (self._groups.get(_plain(text), set()) for text in raw)
        return bool(set.intersection(*rows))


def as_seen(raw: Pair, cleaned: Pair) -> Pair:
    """What a judge is to see of a pair: the cleaned texts, unless only what they dropped differs.

    Two texts that cleaning makes equal would be shown as one and called the same. They are shown
    folded instead: their letters are those of the ground truth, so they can say nothing else.
    """
    if cleaned.ground_truth != cleaned.answer or not cleaned.answer:
        return cleaned
    folded = Pair(fold(raw.ground_truth), fold(raw.answer))
    return cleaned if folded.ground_truth == folded.answer else folded


def _plain(name: str) -> str:
    """A name as the table compares it."""
    return " ".join(fold(name).replace("_", " ").split())


def _read_rows(path: Path) -> list[list[str]]:
    """Rows of equal names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            value = json.loads(text)
        else:
            value = [
                [cell for cell in row if cell.strip()] for row in csv.reader(text.splitlines())
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise JudgeError(f"synonyms {path}: cannot be read: {error}; set judge.synonyms") from error
    if not isinstance(value, list) or not all(
        isinstance(row, list) and all(isinstance(name, str) for name in row) for row in value
    ):
        raise JudgeError(f"synonyms {path}: expected a list of lists of names")
    return [row for row in value if row]
