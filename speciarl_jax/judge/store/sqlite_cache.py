"""Verdicts in a SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.store.base import ROW_FIELDS, Row, VerdictCache
from speciarl_jax.types import Category, JsonObject

_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key BLOB PRIMARY KEY, category INTEGER NOT NULL, judge TEXT NOT NULL,
    ground_truth TEXT NOT NULL, answer TEXT NOT NULL, scope TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""
_CHUNK = 500  # keys in one SELECT


class SqliteCache(VerdictCache):
    """One SQLite file."""

    def __init__(self, path: str = "", memory_entries: int = 500_000) -> None:
        """Opens the file, made if missing; `""` keeps verdicts in memory only.

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
        query = f"SELECT {', '.join(ROW_FIELDS)} FROM verdicts ORDER BY ground_truth, answer, key"
        yield from self._db.execute(query)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def stats(self) -> JsonObject:
        """Number of labels in all, by category, by judge and by scope."""
        by_category, by_judge, by_scope = (
            dict(self._db.execute(f"SELECT {column}, count(*) FROM verdicts GROUP BY 1").fetchall())
            for column in ("category", "judge", "scope")
        )
        return {
            "labels": len(self),
            "bytes": Path(self.place).stat().st_size if self.place else 0,
            "by_category": {Category(number).label: n for number, n in by_category.items()},
            "by_judge": by_judge,
            "by_scope": by_scope,
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
