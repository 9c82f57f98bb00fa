"""The section on the judge: what it was asked, what it said most, where it said two things."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Sequence
from pathlib import Path

from speciarl_jax.judge.store.verdict_log import LoggedVerdict, VerdictLog
from speciarl_jax.report import sections
from speciarl_jax.report.html import Markup, el, join
from speciarl_jax.report.load import Run, Series
from speciarl_jax.report.style import readable
from speciarl_jax.types import Category

LOG_FILE = "verdicts.sqlite"
_PAIRS = 6  # shown per label
_DISAGREEMENTS = 20
_CHARS = 80  # of a name
# Metric -> what it is; `judge/*` are running totals of the client, so the last value counts.
_TOTALS = {
    "judge/requests": "requests sent",
    "judge/retries": "sent once more",
    "judge/latency_s": "seconds a reply",
    "judge/prompt_tokens": "prompt tokens",
    "judge/completion_tokens": "reply tokens",
}


def read_log(run: Run) -> list[LoggedVerdict]:
    """The run's verdict log, most frequent pair first; empty if it has none.

    Raises:
        JudgeError: the file is no verdict log.
    """
    judge = run.config.get("judge")
    named = judge.get("log_path") if isinstance(judge, dict) else None
    path = Path(named) if isinstance(named, str) and named else run.path / LOG_FILE
    if not path.is_file():
        return []
    with contextlib.closing(VerdictLog(str(path))) as log:
        return log.rows()


def judge_section(runs: Sequence[Run]) -> Markup | None:
    """Calls, frequent pairs and disagreements of every run that has a verdict log."""
    blocks = []
    for run in runs:
        rows = read_log(run)
        if not rows:
            continue
        title = el("h3", el("bdi", run.name)) if len(runs) > 1 else None
        blocks.append(join(title, _calls(rows, run.series), _frequent(rows), _disagreements(rows)))
    return el("section", el("h2", "Judge"), *blocks, id="judge") if blocks else None


def _calls(rows: Sequence[LoggedVerdict], series: Series) -> Markup:
    """How often it was asked, and by whom it was answered."""
    total = sum(r.count for r in rows)
    pairs = len({(r.ground_truth, r.answer) for r in rows})
    failed = sum(r.count for r in rows if is_failed(r))
    facts = [
        ("labels asked for", f"{total:,}"),
        ("different pairs", f"{pairs:,}"),
        ("without a label", f"{failed:,} ({failed / total:.1%})"),
    ]
    if "judge/cache_hit_frac" in series:
        facts.append(("from the cache", f"{series['judge/cache_hit_frac'][-1][1]:.1%}"))
    for name, text in _TOTALS.items():
        if name in series:
            facts.append((text, format_total(series[name][-1][1])))
    judges: collections.Counter[str] = collections.Counter()
    for r in rows:
        if not is_failed(r):
            judges[r.judge] += r.count
    facts += [(f"decided by {name}", f"{count:,}") for name, count in judges.most_common()]
    lines = [el("tr", el("th", text, scope="row"), el("td", value)) for text, value in facts]
    return sections.scroll(el("table", el("tbody", *lines), class_="facts"), "Judge calls")


def format_total(value: float) -> str:
    """Counts whole, seconds to two digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.2g}"


def is_failed(row: LoggedVerdict) -> bool:
    """True for a pair that got no label."""
    return row.category.startswith("failed:")


def _name(text: str) -> Markup:
    return el("bdi", text if len(text) <= _CHARS else text[:_CHARS] + "…")


def _table(columns: Sequence[str], lines: Sequence[Markup], label: str) -> Markup:
    head = el("tr", *(el("th", c, scope="col") for c in columns))
    return sections.scroll(
        el("table", el("thead", head), el("tbody", *lines), class_="pairs"), label
    )


def _frequent(rows: Sequence[LoggedVerdict]) -> Markup:
    """The most frequent pairs of each label, best label first, failures last."""
    by_label: dict[str, list[LoggedVerdict]] = collections.defaultdict(list)
    for r in rows:
        by_label[r.category].append(r)
    order = [c.label for c in reversed(Category) if c.label in by_label]
    lines = []
    for label in [*order, *sorted(set(by_label) - set(order))]:
        found = by_label[label]
        count = sum(r.count for r in found)
        title = f"{readable(label)}: given {count:,}× to {len(found):,} different"
        lines.append(el("tr", el("th", title, colspan=4, scope="rowgroup"), class_="note"))
        lines += [_pair_line(r) for r in found[:_PAIRS]]
    columns = ("truth", "answer", "times", "steps")
    return el(
        "details",
        el("summary", "Most frequent pairs of each label"),
        _table(columns, lines, "Most frequent pairs"),
    )


def _pair_line(r: LoggedVerdict) -> Markup:
    steps = f"{r.first_step}" if r.first_step == r.last_step else f"{r.first_step}–{r.last_step}"
    return el(
        "tr",
        el("th", _name(r.ground_truth), scope="row"),
        el("td", _name(r.answer), class_="text"),
        el("td", f"{r.count:,}"),
        el("td", steps),
    )


def _disagreements(rows: Sequence[LoggedVerdict]) -> Markup:
    """Pairs that were given several labels: at other times, or by other judges."""
    labels: dict[tuple[str, str], list[LoggedVerdict]] = collections.defaultdict(list)
    for r in rows:
        if not is_failed(r):
            labels[r.ground_truth, r.answer].append(r)
    split = [found for found in labels.values() if len({r.category for r in found}) > 1]
    if not split:
        return el("p", "No pair was given two different labels.", class_="muted")
    split.sort(key=lambda found: -sum(r.count for r in found))
    lines = [
        el(
            "tr",
            el("th", _name(found[0].ground_truth), scope="row"),
            el("td", _name(found[0].answer), class_="text"),
            el("td", ", ".join(_said(r) for r in found), class_="text"),
        )
        for found in split[:_DISAGREEMENTS]
    ]
    caption = f"Pairs with two different labels: {len(split):,}"
    if len(split) > _DISAGREEMENTS:
        caption += f", the {_DISAGREEMENTS} most frequent here"
    return join(
        el("p", caption + ".", class_="caption"),
        _table(("truth", "answer", "labels"), lines, "Disagreements"),
    )


def _said(r: LoggedVerdict) -> str:
    return f"{readable(r.category)} {r.count:,}× ({r.judge})"
