"""Metrics as terminal tables (rich)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

COLUMNS = {
    "specificity": "specificity",
    "correctness": "correctness",
    "hm": "HM",
    "format_failure_rate": "format fail",
    "judge_failure_rate": "judge fail",
}
_MAIN = ("specificity", "correctness", "hm")


def format_value(value: float | None, *, is_signed: bool = False) -> str:
    """Three decimals without the leading zero, as the paper prints them; an em dash for None."""
    if value is None:
        return "—"
    text = f"{value:+.3f}" if is_signed else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def format_estimate(estimate: Mapping[str, float | None], *, is_signed: bool = False) -> str:
    """``.883 [.871, .895]``; the interval is left out where it is undefined."""
    value = format_value(estimate["value"], is_signed=is_signed)
    if estimate["low"] is None or estimate["high"] is None:
        return value
    low, high = (format_value(estimate[k], is_signed=is_signed) for k in ("low", "high"))
    return f"{value} [{low}, {high}]"


def metric_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yields (name, scores, is_average) for data sets first, then averages that say more.

    An average over the single data set that stands above it is left out.
    """
    for name, scores in metrics["datasets"].items():
        yield name, scores, False
    shown: list[list[str]] = [[name] for name in metrics["datasets"]]
    for name, scores in metrics["averages"].items():
        members = list(scores.get("datasets", []))
        if members not in shown:
            shown.append(members)
            yield f"mean {name}", scores, True


def metrics_table(metrics: Mapping[str, Any], title: str) -> Table:
    """One line per data set and average, each metric with its 95 % interval.

    Args:
        metrics: content of ``metrics.json``.
        title: above the table.
    """
    table = Table(title=title, title_justify="left", caption="[ ]: 95 % bootstrap over images")
    table.add_column("data set", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    for name, scores, is_average in metric_rows(metrics):
        cells = [
            format_estimate(scores[m]).replace("[", "\\[")
            if m in _MAIN
            else format_value(scores[m]["value"])
            for m in COLUMNS
        ]
        table.add_row(name, *cells, str(scores["n"]), style="bold" if is_average else None)
    return table


def comparison_table(
    base: Mapping[str, Any],
    trained: Mapping[str, Any],
    title: str,
    names: tuple[str, str] = ("base", "trained"),
    differences: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """Two runs side by side: both values and the difference of each of the three metrics.

    Args:
        base: content of the first ``metrics.json``.
        trained: content of the second.
        title: above the table.
        names: headings of the two runs.
        differences: by data set or ``mean <average>``, as `scoring.paired_differences` returns
            them; a difference whose interval excludes 0 is coloured. None prints plain differences.
    """
    table = Table(title=title, title_justify="left", caption="[ ]: 95 % paired bootstrap")
    for heading in ("data set", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in (*names, "difference"):
        table.add_column(heading, justify="right")
    second = {name: scores for name, scores, _ in metric_rows(trained)}
    for name, scores, is_average in metric_rows(base):
        if name not in second:
            continue
        for metric in _MAIN:
            a, b = scores[metric]["value"], second[name][metric]["value"]
            paired = (differences or {}).get(name)
            table.add_row(
                name if metric == _MAIN[0] else "",
                COLUMNS[metric],
                format_value(a),
                format_value(b),
                _styled(paired[metric] if paired else _plain(a, b)),
                style="bold" if is_average else None,
                end_section=metric == _MAIN[-1],
            )
    return table


def _plain(a: float | None, b: float | None) -> dict[str, float | None]:
    value = None if a is None or b is None else b - a
    return {"value": value, "low": None, "high": None}


def _styled(difference: Mapping[str, float | None]) -> str:
    text = format_estimate(difference, is_signed=True).replace("[", "\\[")
    low, high = difference["low"], difference["high"]
    if low is not None and low > 0:
        return f"[green]{text}[/green]"
    if high is not None and high < 0:
        return f"[red]{text}[/red]"
    return text
