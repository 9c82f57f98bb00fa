"""What the judge said in a run: pair, category, judge, how often, first and last step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from speciarl_jax.judge.base import Outcome, Pair
from speciarl_jax.judge.store.sqlite_cache import open_database
from speciarl_jax.types import Verdict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    ground_truth TEXT, answer TEXT, category TEXT, judge TEXT, step INTEGER, count INTEGER,
    PRIMARY KEY (ground_truth, answer, category, judge, step)
) WITHOUT ROWID
"""
_INSERT = """
INSERT INTO log VALUES (?,?,?,?,?,?)
ON CONFLICT DO UPDATE SET count = count + excluded.count
"""
_SELECT = """
SELECT ground_truth, answer, category, judge, sum(count), min(step), max(step) FROM log
WHERE (:category = '' OR category = :category) AND (:text = '' OR ground_truth = :text
       OR answer = :text)
GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC, 1, 2, 3, 4 LIMIT :limit
"""


@dataclasses.dataclass(frozen=True)
class LoggedVerdict:
    """One line of the log.

    Attributes:
        ground_truth, answer: normalised.
        category: label, or `failed:<kind>` for a pair that got none.
        count: how many rollouts it was given to.
        first_step, last_step: training steps, inclusive.
    """

    ground_truth: str
    answer: str
    category: str
    judge: str
    count: int
    first_step: int
    last_step: int


class VerdictLog:
    """A SQLite file with one row per pair, label, judge and step."""

    def __init__(self, path: str) -> None:
        """Opens or makes the file.

        Raises:
            JudgeError: the file cannot be opened.
        """
        self._db = open_database(path, _SCHEMA)

    def add(self, step: int, pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> None:
        """Counts one answered call, in one transaction."""
        counts = collections.Counter(
            (pair.ground_truth, pair.answer, *_describe(outcome))
            for pair, outcome in zip(pairs, outcomes, strict=True)
        )
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(_INSERT, [(*key, step, count) for key, count in counts.items()])
        self._db.execute("COMMIT")

    def rows(self, category: str = "", text: str = "", limit: int = -1) -> list[LoggedVerdict]:
        """Lines of the log, most frequent first.

        Args:
            category: only this label (or `failed:timeout`, ...); empty for all.
            text: only pairs with this normalised ground truth or answer; empty for all.
            limit: at most that many; -1 for all.
        """
        query = {"category": category, "text": text, "limit": limit}
        return [LoggedVerdict(*row) for row in self._db.execute(_SELECT, query)]

    def cut_back(self, step: int) -> int:
        """Forgets everything after `step`, as a resumed run must; returns rows removed."""
        return self._db.execute("DELETE FROM log WHERE step > ?", (step,)).rowcount

    def close(self) -> None:
        """Closes the file."""
        self._db.close()


def _describe(outcome: Outcome) -> tuple[str, str]:
    """Category and judge columns of an outcome."""
    if isinstance(outcome, Verdict):
        return outcome.category.label, outcome.judge
    return f"failed:{outcome.kind.value}", ""
