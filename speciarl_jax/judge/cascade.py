"""Pairs that need no model: equal after normalisation, or equal by a synonym table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.parse import normalize
from speciarl_jax.types import Category


class Cascade:
    """Exact match, then synonym table; None means: ask the model."""

    def __init__(self, synonyms: str = "") -> None:
        """Reads a synonym table: CSV rows or a JSON list of lists; names of a row are equal.

        Args:
            synonyms: path of the table; empty for none.

        Raises:
            JudgeError: the file is missing, not of that form, or a name is empty.
        """
        self._groups: dict[str, set[int]] = {}  # normalised name -> rows that hold it
        for number, names in enumerate(_read_rows(Path(synonyms)) if synonyms else (), start=1):
            for name in names:
                if not normalize(name):
                    raise JudgeError(
                        f"synonyms {synonyms} row {number}: the name {name!r} is empty"
                    )
                self._groups.setdefault(normalize(name), set()).add(number)

    def decide(self, pair: Pair) -> tuple[Category, str] | None:
        """Category and judge name for a normalised pair, or None if a model must decide."""
        if pair.ground_truth == pair.answer:
            return Category.SPECIFIC, "exact"
        if self._groups.get(pair.ground_truth, set()) & self._groups.get(pair.answer, set()):
            return Category.SPECIFIC, "synonym"
        return None


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
