"""Evaluation as terminal tables (rich)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from speciarl_jax.scoring.results import (
    Comparison,
    Difference,
    Estimate,
    Evaluation,
    MainMetric,
    Metric,
    Scores,
    TextMetrics,
)
from speciarl_jax.scoring.text_metrics import METRICS

MAIN: dict[MainMetric, str] = {
    "specificity": "Specificity",
    "correctness": "Correctness",
    "hm": "HM",
}
_COLUMNS: dict[Metric, str] = {
    "specificity": "specificity",
    "correctness": "correctness",
    "hm": "HM",
    "format_failure_rate": "format\nfail",
    "judge_failure_rate": "judge\nfail",
}


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


def metric_rows(metrics: Evaluation) -> Iterator[tuple[str, Scores, bool]]:
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


def metrics_table(metrics: Evaluation, title: str) -> Table:
    """One line per data set and average, each metric with its 95 % interval."""
    table = _table_of(title, list(_COLUMNS.values()))
    for name, scores, is_average in metric_rows(metrics):
        cells = [
            _wrappable(scores[m]) if m in MAIN else format_value(scores[m]["value"])
            for m in _COLUMNS
        ]
        table.add_row(name, *cells, str(scores["n"]), style="bold" if is_average else None)
    return table


def _table_of(title: str, headings: Sequence[str]) -> Table:
    """An empty table: data set, the headings, n; it fits 80 columns by wrapping its cells."""
    table = Table(
        title=title,
        title_justify="left",
        caption="[ ]: 95 % bootstrap over images",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold underline",
    )
    table.add_column("data set", overflow="fold")
    for heading in headings:
        is_rate = heading.endswith("fail")
        min_width = len("format") if is_rate else len("[1.000,1.000]")
        table.add_column(heading, justify="right", min_width=min_width)
    table.add_column("n", justify="right", min_width=5)
    return table


def _wrappable(estimate: Mapping[str, float | None], *, is_signed: bool = False) -> str:
    """Value and interval, each one word, so that a narrow terminal puts them on two lines."""
    text = format_estimate(estimate, is_signed=is_signed)
    return text.replace(", ", ",").replace("[", "\\[")


def text_table(text: TextMetrics, title: str) -> Table:
    """Text metrics, one line per data set and one for their mean."""
    means = {f"mean {name}": scores for name, scores in text["averages"].items()}
    lines = text["datasets"] | (means if len(text["datasets"]) > 1 else {})
    metrics = [m for m in METRICS if any(m in scores for scores in lines.values())]
    table = _table_of(title, [metric.replace("_", " ") for metric in metrics])
    for name, scores in lines.items():
        cells = [_wrappable(scores[m]) for m in metrics]
        table.add_row(name, *cells, str(scores["n"]), style="bold" if name in means else None)
    return table


def seeds_table(means: Mapping[str, Mapping[MainMetric, Estimate]], title: str) -> Table:
    """One line per data set and average: means over seeds with their t intervals.

    Args:
        means: as `compare.over_seeds` returns them.
        title: above the table.
    """
    table = _open_table(title, "[ ]: 95 %, Student's t over seeds")
    for heading in ("data set", *(_COLUMNS[m] for m in MAIN)):
        table.add_column(heading, justify="left" if heading == "data set" else "right")
    for name, estimates in means.items():
        table.add_row(name, *(_wrappable(estimates[m]) for m in MAIN))
    return table


def _open_table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def comparison_table(
    compared: Comparison, title: str, names: tuple[str, str] = ("base", "trained")
) -> Table:
    """Two evaluations side by side: both values of each of the three metrics and their difference.

    A difference whose interval excludes 0 is coloured. Beside correctness stands how many images
    are wrong on one side only, of how many; a dash where that is not a number of images (see
    `scoring.metrics.paired_differences`).
    """
    table = _open_table(
        title,
        "[ ]: 95 %, paired; of correctness Tango's score interval where 'changed' has a number, "
        "else and of the others bootstrap over images",
    )
    for heading in ("data set", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in (*names, "difference", "changed"):
        table.add_column(heading, justify="right")
    second = {name: scores for name, scores, _ in metric_rows(compared["b"])}
    for name, scores, is_average in metric_rows(compared["a"]):
        for i, metric in enumerate(MAIN):
            table.add_row(
                "" if i else name,
                _COLUMNS[metric],
                format_value(scores[metric]["value"]),
                format_value(second[name][metric]["value"]),
                _styled(compared["differences"][name][metric]),
                _changed(compared["differences"][name]) if metric == "correctness" else "",
                style="bold" if is_average else None,
                end_section=metric == "hm",
            )
    return table


def _changed(difference: Difference) -> str:
    discordant = difference["discordant"]
    return "—" if discordant is None else f"{discordant}/{difference['n_images']}"


def _styled(difference: Mapping[str, float | None]) -> str:
    text = _wrappable(difference, is_signed=True)
    low, high = difference["low"], difference["high"]
    if low is not None and low > 0:
        return f"[green]{text}[/green]"
    if high is not None and high < 0:
        return f"[red]{text}[/red]"
    return text
