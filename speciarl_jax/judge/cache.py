"""Verdicts that last: a SQLite file in WAL mode, or a Redis server that several hosts share.

Each verdict is written as it arrives. The key is a hash of everything that could change a label:
model, revision, prompt wording, sampling parameters and the two normalised texts. Only labels are
kept, never failures.
"""

from __future__ import annotations

import abc
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from speciarl_jax.files import whole_file
from speciarl_jax.judge.base import JudgeError, Pair
from speciarl_jax.types import Category, JsonObject, JsonValue, Verdict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key BLOB PRIMARY KEY, category INTEGER NOT NULL, judge TEXT NOT NULL,
    ground_truth TEXT NOT NULL, answer TEXT NOT NULL, scope TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
_CHUNK = 500  # keys in one SELECT
REDIS_SCHEMES = ("redis://", "rediss://")
_FIELDS = ("key", "category", "judge", "ground_truth", "answer", "scope", "created")


class KeyMaker:
    """Cache keys of one judge: everything but the pair is hashed once."""

    def __init__(self, **settings: str | float) -> None:
        """Fixes the settings that belong to the key (model, revision, prompt, sampling)."""
        self.scope = json.dumps(settings, sort_keys=True)
        self._prefix = hashlib.sha256(self.scope.encode() + b"\0")

    def key(self, pair: Pair) -> bytes:
        """16 bytes for a normalised pair (which holds no NUL)."""
        return self.keys([pair])[0]

    def keys(self, pairs: Sequence[Pair]) -> list[bytes]:
        """The key of each pair, 16 bytes."""
        found = []
        for truth, answer in pairs:
            digest = self._prefix.copy()
            digest.update(f"{truth}\0{answer}".encode("utf-8", "surrogatepass"))
            found.append(digest.digest()[:16])
        return found


def open_database(path: str, schema: str) -> sqlite3.Connection:
    """Opens (creating if needed) a WAL-mode database; `""` is a private one in memory.

    Raises:
        JudgeError: the folder is missing, or the file is no database.
    """
    try:
        connection = sqlite3.connect(
            path or ":memory:", timeout=30.0, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(schema)
    except sqlite3.Error as error:
        raise JudgeError(
            f"judge database {path}: {error}; use another path or move the file away"
        ) from error
    return connection


Row = tuple[bytes, int, str, str, str, str, float]  # in the order of _FIELDS


class VerdictCache(abc.ABC):
    """A durable map from key to label, with the most recent part in memory.

    Backends say how rows are fetched, inserted, listed and deleted.
    """

    def __init__(self, place: str, memory_entries: int = 500_000) -> None:
        """Starts with an empty memory.

        Args:
            place: file or URL, for messages.
            memory_entries: labels held in memory at most; older ones are fetched again.
        """
        self.place = place
        self._memory: dict[bytes, Verdict] = {}
        self._memory_entries = memory_entries

    @abc.abstractmethod
    def _fetch(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, str]]:
        """(key, category, judge) of those keys that are known."""

    @abc.abstractmethod
    def _insert(self, rows: Sequence[Row]) -> int:
        """Stores rows durably, all or none; keys already there keep theirs.

        Returns:
            How many were new.

        Raises:
            JudgeError: the place cannot be written.
        """

    @abc.abstractmethod
    def _scan(self) -> Iterator[Row]:
        """Every row, ordered by ground truth, answer and key."""

    @abc.abstractmethod
    def purge(self, judge: str = "", older_than_s: float = 0.0) -> int:
        """Deletes labels of a judge (all judges if empty) older than an age; returns how many."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of labels."""

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
        memory = self._memory
        found = {key: memory[key] for key in keys if key in memory}
        missing = [key for key in keys if key not in found] if len(found) < len(keys) else []
        if missing:
            for key, category, judge in self._fetch(missing):
                found[key] = self._remember(key, category, judge)
        return found

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
            yield dict(zip(_FIELDS, values, strict=True))

    def export(self, path: str | Path) -> int:
        """Writes every label as a line of JSON; returns how many."""
        count = 0
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in self.rows():
                file.write(json.dumps(row) + "\n")
                count += 1
        return count

    def import_(self, path: str | Path) -> int:
        """Reads lines that `export` wrote; labels already here stay. All or nothing.

        Returns:
            Number of new labels.

        Raises:
            JudgeError: a line is not of that form; the message names it.
        """
        rows = []
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                rows.append(_parse_row(f"{path} line {number}", line))
        return self._insert(rows)


def _parse_row(where: str, line: str) -> Row:
    """A row out of a line of JSON.

    Raises:
        JudgeError: the line is not of that form.
    """
    try:
        item = json.loads(line)
        key, label, judge, truth, answer, scope, created = (item[field] for field in _FIELDS)
        category = int(Category.from_label(label))
        return bytes.fromhex(key), category, str(judge), str(truth), str(answer), scope, created
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{where}: not an exported verdict: {error}") from error


class SqliteCache(VerdictCache):
    """One SQLite file."""

    def __init__(self, path: str = "", memory_entries: int = 500_000) -> None:
        """Opens the file.

        Args:
            path: SQLite file, made if missing; `""` keeps verdicts in memory only.
            memory_entries: labels held in memory at most; older ones are read from the file.

        Raises:
            JudgeError: the file cannot be opened.
        """
        super().__init__(path, memory_entries)
        self._db = open_database(path, _SCHEMA)

    def _fetch(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, str]]:
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT key, category, judge FROM verdicts WHERE key IN ({marks})"
            yield from self._db.execute(query, chunk)

    def _insert(self, rows: Iterable[Row]) -> int:
        before = self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO verdicts VALUES (?,?,?,?,?,?,?)", rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise JudgeError(f"judge cache {self.place}: cannot be written: {error}") from error
        return self._db.total_changes - before

    def _scan(self) -> Iterator[Row]:
        query = f"SELECT {', '.join(_FIELDS)} FROM verdicts ORDER BY ground_truth, answer, key"
        yield from self._db.execute(query)

    def __len__(self) -> int:
        """Number of labels."""
        return int(self._db.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def stats(self) -> JsonObject:
        """Number of labels in all, by category, by judge and by scope."""
        by_category = self._db.execute("SELECT category, count(*) FROM verdicts GROUP BY 1")
        by_judge = self._db.execute("SELECT judge, count(*) FROM verdicts GROUP BY 1")
        by_scope = self._db.execute("SELECT scope, count(*) FROM verdicts GROUP BY 1")
        return {
            "labels": len(self),
            "bytes": Path(self.place).stat().st_size if self.place else 0,
            "by_category": {Category(number).label: count for number, count in by_category},
            "by_judge": dict(by_judge.fetchall()),
            "by_scope": dict(by_scope.fetchall()),
        }

    def purge(self, judge: str = "", older_than_s: float = 0.0) -> int:
        """Deletes labels of a judge (all judges if empty) older than an age; returns how many."""
        before = self._db.total_changes
        self._db.execute(
            "DELETE FROM verdicts WHERE (? = '' OR judge = ?) AND created <= ?",
            (judge, judge, time.time() - older_than_s),
        )
        self._memory.clear()
        return self._db.total_changes - before

    def close(self) -> None:
        """Closes the file."""
        self._db.close()


def open_cache(place: str) -> VerdictCache:
    """The cache at a place: `redis://HOST:PORT/DB` (`rediss://` over TLS), else a SQLite file.

    Raises:
        ValueError: a Redis URL, and the package redis is not installed.
        JudgeError: the file cannot be opened, or the server does not answer.
    """
    if not place.startswith(REDIS_SCHEMES):
        return SqliteCache(place)
    from speciarl_jax.judge.redis_cache import RedisCache

    return RedisCache(place)
