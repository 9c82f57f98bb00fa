"""Record and replay: every outcome of a run, so that it can be run again without a judge.

A label is the same at every step, so it is kept once per pair. A failure is kept per step, and
while recording a pair that failed in a step stays failed for the rest of that step: otherwise two
groups of a step could see different outcomes of one pair and no replay could tell which is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

from speciarl_jax.judge.base import Outcome, Pair, ReplayMissError, failure
from speciarl_jax.judge.store.sqlite_cache import open_database
from speciarl_jax.types import Category, Failure, FailureKind, Verdict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS recording (
    key BLOB, step INTEGER, category INTEGER, judge TEXT, kind TEXT, message TEXT,
    ground_truth TEXT, answer TEXT, PRIMARY KEY (key, step)
) WITHOUT ROWID
"""
_EVERY_STEP = -1
Row = tuple[bytes, int, int | None, str, str, str, str, str]  # in the order of the columns


class Recording:
    """A SQLite file of outcomes by (pair, step)."""

    def __init__(self, path: str) -> None:
        """Opens or makes the file.

        Raises:
            JudgeError: the file cannot be opened.
        """
        self._path = path
        self._db = open_database(path, _SCHEMA)
        self._known: dict[tuple[bytes, int], Outcome] = {}
        for key, step, category, judge, kind, message in self._db.execute(
            "SELECT key, step, category, judge, kind, message FROM recording"
        ):
            self._known[key, step] = (
                Verdict(Category(category), judge, is_cached=True)
                if category is not None
                else failure(FailureKind(kind), message)
            )

    def find(self, key: bytes, step: int) -> Outcome | None:
        """What was recorded for the pair in that step, if anything."""
        return self._known.get((key, step)) or self._known.get((key, _EVERY_STEP))

    def replay(self, key: bytes, step: int, pair: Pair) -> Outcome:
        """The recorded outcome.

        Raises:
            ReplayMissError: nothing was recorded; the message names the pair.
        """
        outcome = self.find(key, step)
        if outcome is None:
            raise ReplayMissError(
                f"replay: {self._path} holds no verdict at step {step} for ground truth "
                f"{pair.ground_truth!r}, answer {pair.answer!r}; the run differs from the "
                "recorded one (seed, model, prompt?): record it with judge.mode=record"
            )
        return outcome

    def keep(self, key: bytes, step: int, pair: Pair, outcome: Outcome) -> Row | None:
        """Keeps an outcome in memory; what is there already stays.

        Returns:
            The row to `write`, None if there is nothing new.
        """
        columns: tuple[int | None, str, str, str]
        if isinstance(outcome, Failure):
            columns = (None, "", outcome.kind.value, outcome.message)
        else:
            step, columns = _EVERY_STEP, (int(outcome.category), outcome.judge, "", "")
        if (key, step) in self._known:
            return None
        self._known[key, step] = outcome
        return (key, step, *columns, *pair)

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows that `keep` gave, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT OR IGNORE INTO recording VALUES (?,?,?,?,?,?,?,?)", rows)
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
