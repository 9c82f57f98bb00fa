"""What a store of verdicts can do."""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.files import whole_file
from speciarl_jax.judge.base import Pair
from speciarl_jax.types import Category, JsonObject, JsonValue, Verdict

ROW_FIELDS = ("key", "category", "judge", "ground_truth", "answer", "scope", "created")
Row = tuple[bytes, int, str, str, str, str, float]  # in the order of ROW_FIELDS


class VerdictCache(abc.ABC):
    """A durable map from key to label, with the most recent part in memory.

    Backends say how rows are fetched, inserted, listed and deleted.
    """

    def __init__(self, place: str, memory_entries: int = 500_000) -> None:
        """Starts with an empty memory.

        Args:
            place: file or URL, for messages.
            memory_entries: labels held in memory at most; the oldest are fetched again.
        """
        self.place = place
        self._memory: dict[bytes, Verdict] = {}
        self._memory_entries = memory_entries

    @abc.abstractmethod
    def _fetch(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, str]]:
        """(key, category, judge) of those keys that are known."""

    @abc.abstractmethod
    def _insert(self, rows: Sequence[Row]) -> int:
        """Stores rows durably, all or none; keys already there keep theirs. Counts the new ones."""

    @abc.abstractmethod
    def _scan(self) -> Iterator[Row]:
        """Every row, ordered by ground truth, answer and key."""

    @abc.abstractmethod
    def purge(self, judge: str = "", older_than_s: float = 0.0) -> int:
        """Deletes labels of a judge (all judges if empty) older than an age; returns how many."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def stats(self) -> JsonObject:
        """Number of labels in all, by category, by judge and by scope."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the connection or closes the file."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Verdict]:
        """Verdicts, marked as cached, of those keys that are known.

        Raises:
            JudgeError: the place cannot be read.
        """
        found = self.recall(keys)
        missing = [key for key in keys if key not in found] if len(found) < len(keys) else []
        return {**found, **self.remember(self.fetch(missing))} if missing else found

    def recall(self, keys: Sequence[bytes]) -> dict[bytes, Verdict]:
        """Verdicts of those keys that are in memory."""
        memory = self._memory
        return {key: memory[key] for key in keys if key in memory}

    def fetch(self, keys: Sequence[bytes]) -> list[tuple[bytes, int, str]]:
        """(key, category, judge) of those keys that the place holds; touches no memory.

        Raises:
            JudgeError: the place cannot be read.
        """
        return list(self._fetch(keys))

    def remember(self, found: Iterable[tuple[bytes, int, str]]) -> dict[bytes, Verdict]:
        """Takes what `fetch` gave, or what was stored, into memory."""
        return {key: self._remember(key, category, judge) for key, category, judge in found}

    def store(self, rows: Sequence[Row]) -> None:
        """Stores labels, durably before it returns and all or none; touches no memory.

        Raises:
            JudgeError: the place cannot be written (disk full, read-only, server gone).
        """
        self._insert(rows)

    def put(self, key: bytes, pair: Pair, category: Category, judge: str, scope: str) -> None:
        """Stores a label, durably before it returns; a label already there stays.

        Raises:
            JudgeError: the place cannot be written (disk full, read-only, server gone).
        """
        self._insert(
            [(key, int(category), judge, pair.ground_truth, pair.answer, scope, time.time())]
        )
        self._remember(key, int(category), judge)

    def _remember(self, key: bytes, category: int, judge: str) -> Verdict:
        """Keeps a label in memory, dropping the oldest if there are too many."""
        if len(self._memory) >= self._memory_entries:
            del self._memory[next(iter(self._memory))]
        verdict = self._memory[key] = Verdict(Category(category), judge, is_cached=True)
        return verdict

    def rows(self) -> Iterator[JsonObject]:
        """Every label as one JSON-ready object, ordered by ground truth and answer."""
        for row in self._scan():
            values: tuple[JsonValue, ...] = (row[0].hex(), Category(row[1]).label, *row[2:])
            yield dict(zip(ROW_FIELDS, values, strict=True))

    def export(self, path: str | Path) -> int:
        """Writes every label as a line of JSON; returns how many."""
        count = 0
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in self.rows():
                file.write(json.dumps(row) + "\n")
                count += 1
        return count

    def import_(self, path: str | Path) -> int:
        """Reads lines that `export` wrote, all or none; labels already here stay.

        Returns:
            Number of new labels.

        Raises:
            JudgeError: a line is not of that form; the message names it.
        """
        with Path(path).open(encoding="utf-8") as file:
            return self._insert(
                [_parse_row(f"{path} line {number}", line) for number, line in enumerate(file, 1)]
            )


def _parse_row(where: str, line: str) -> Row:
    """A row out of a line of JSON."""
    try:
        item = json.loads(line)
        key, label, judge, truth, answer, scope, created = (item[field] for field in ROW_FIELDS)
        category = int(Category.from_label(label))
        return bytes.fromhex(key), category, str(judge), str(truth), str(answer), scope, created
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{where}: not an exported verdict: {error}") from error
