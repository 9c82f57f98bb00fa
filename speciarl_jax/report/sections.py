"""Tables of the page, as escaped HTML."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from speciarl_jax.report.html import Markup, el, join
from speciarl_jax.report.levels import Confusion
from speciarl_jax.report.load import Run
from speciarl_jax.report.style import readable
from speciarl_jax.report.tables import MAIN, format_estimate, format_value, metric_rows
from speciarl_jax.scoring.predictions import RUNGS, Prediction
from speciarl_jax.scoring.results import (
    Comparison,
    MainEstimates,
    TextMetrics,
    TextScores,
)
from speciarl_jax.scoring.text_metrics import METRICS as TEXT_METRICS

_HEADLINE = ("fine_grained", "out_of_domain", "all", "in_domain")


@dataclasses.dataclass(frozen=True)
class Published:
    """One row the paper published; metrics are means over Flowers102, Food101 and OxfordPets.

    Trained on 3,000 CUB images with Qwen2.5-VL-7B; judged by Llama-3-70B. From secondary sources,
    +-.001. For orientation: another judge, data or model gives another level.
    """

    name: str
    specificity: float
    correctness: float
    hm: float
    very_fine_hm: float | None = None  # mean over StanfordCars and FGVCAircraft


PUBLISHED = (
    Published("zero-shot", 0.742, 0.846, 0.790),
    Published("“be specific” prompt", 0.816, 0.832, 0.822),
    Published("SFT", 0.935, 0.807, 0.866, 0.814),
    Published("binary-reward RFT", 0.875, 0.785, 0.825, 0.821),
    Published("SpeciaRL", 0.920, 0.848, 0.883, 0.830),
    Published("best-of-64 of the base", 0.889, 0.984, 0.933, 0.868),
)


def scroll(table: Markup, label: str) -> Markup:
    """A table that scrolls sideways on a narrow screen, reachable by keyboard."""
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def headline_average(runs: Sequence[Run]) -> str:
    """The average of the headline: what every evaluation has, transfer before in-domain."""
    metrics = [s.metrics["averages"] for r in runs for s in r.stages]
    return next((a for a in _HEADLINE if metrics and all(a in m for m in metrics)), "all")


def _members(runs: Sequence[Run], average: str) -> list[str]:
    averages = [s.metrics["averages"] for r in runs for s in r.stages]
    members = [a[average].get("datasets", []) for a in averages if average in a]
    return list(dict.fromkeys(itertools.chain(*members)))


def _cell(estimate: Mapping[str, float | None], *, is_signed: bool = False) -> Markup:
    value, _, interval = format_estimate(estimate, is_signed=is_signed).partition(" ")
    shown = el("span", value, class_="num")
    return el("td", shown, el("span", interval, class_="ci") if interval else None)


def _whisker(estimate: Mapping[str, float | None], low: float, high: float, css: str) -> Markup:
    """A dot with its interval on an axis shared by all rows."""

    def x(value: float) -> str:
        return f"{6 + 148 * (value - low) / max(high - low, 1e-9):.1f}"

    value = estimate["value"]
    if value is None:
        return el("td")
    parts = [el("line", x1=6, x2=154, y1=9, y2=9, class_="axis")]
    if estimate["low"] is not None and estimate["high"] is not None:
        ends = {"x1": x(estimate["low"]), "x2": x(estimate["high"])}
        parts.append(el("line", y1=9, y2=9, class_=css, **ends))
    parts.append(el("circle", cx=x(value), cy=9, r=4.5, class_=css))
    svg = el("svg", *parts, viewBox="0 0 160 18", class_="whisker", aria_hidden="true")
    return el("td", svg)


def _headline_rows(run: Run, average: str) -> list[tuple[Run, str, MainEstimates, int]]:
    """(run, evaluation, scores, n); sampled ones give what their best of N would score."""
    rows: list[tuple[Run, str, MainEstimates, int]] = []
    for stage in run.stages:
        scores = stage.metrics["averages"].get(average)
        if scores is None:
            continue
        if stage.name != "best_of":
            rows.append((run, readable(stage.name), scores, scores["n"]))
        curve = stage.best_of_curve(average)
        if curve:
            name = "" if stage.name == "best_of" else f"{readable(stage.name)}, "
            best = curve[-1]
            rows.append((run, f"{name}best of {best['k']} (oracle)", best, scores["n"]))
        elif stage.name == "best_of":
            rows.append((run, "best of N (oracle)", scores, scores["n"]))
    return rows


def headline(runs: Sequence[Run]) -> Markup:
    """Every evaluation of every run on the headline average, the paper's rows below."""
    average = headline_average(runs)
    rows = [row for run in runs for row in _headline_rows(run, average)]
    bounds = [v for _, _, scores, _ in rows for v in scores["hm"].values() if v is not None] + [
        p.hm for p in PUBLISHED
    ]
    low, high = min(bounds) - 0.02, max(bounds) + 0.02
    head = el(
        "tr",
        *(el("th", h, scope="col") for h in ("", *MAIN.values(), "HM, 95 % interval", "rollouts")),
    )
    body = []
    for run, stage, scores, n in rows:
        name = el("b", stage)
        if len(runs) > 1:
            name = join(el("bdi", run.name), " · ", name)
        css = f"run{runs.index(run) % 6}" + ("" if stage == "trained" else " hollow")
        body.append(
            el(
                "tr",
                el("th", name, scope="row"),
                *(_cell(scores[m]) for m in MAIN),
                _whisker(scores["hm"], low, high, css),
                el("td", f"{n:,}"),
            )
        )
    paper = [
        el(
            "tr",
            el("th", p.name, scope="row"),
            *(
                el("td", el("span", format_value(v), class_="num"))
                for v in (p.specificity, p.correctness, p.hm)
            ),
            _whisker({"value": p.hm, "low": None, "high": None}, low, high, "published"),
            el("td", "" if p.very_fine_hm is None else format_value(p.very_fine_hm)),
            class_="published",
        )
        for p in PUBLISHED
    ]
    note = el(
        "tr",
        el(
            "th",
            el(
                "span",
                "Rows the paper published (Qwen2.5-VL-7B, trained on CUB; mean of "
                "Flowers102, Food101, OxfordPets; last column: HM on the very fine StanfordCars "
                "and FGVCAircraft; ±.001). Another model, data or judge has another level.",
                class_="stay",
            ),
            colspan=6,
            scope="rowgroup",
        ),
        class_="note",
    )
    names = ", ".join(readable(n) for n in _members(runs, average))
    caption = el(
        "p",
        f"Mean over data sets, {readable(average)}: {names}. Brackets: 95 % bootstrap.",
        class_="caption",
    )
    table = el(
        "table",
        el("thead", head),
        el("tbody", *body),
        el("tbody", note, *paper, class_="paper"),
        class_="headline",
    )
    return join(caption, scroll(table, "Headline metrics"))


def per_dataset(runs: Sequence[Run]) -> Markup:
    """Every data set and average of every evaluation."""
    texts = [stage.metrics["text"] for r in runs for stage in r.stages if "text" in stage.metrics]
    known = {m for text in texts for scores in text["datasets"].values() for m in scores}
    text_metrics = [m for m in TEXT_METRICS if m in known]
    columns = (
        "",
        *MAIN.values(),
        "format failures",
        "judge failures",
        *map(readable, text_metrics),
        "words",
        "n",
    )
    head = el("tr", *(el("th", h, scope="col") for h in columns))
    bodies = []
    for run in runs:
        for stage in run.stages:
            title = join(el("bdi", run.name), " · ", readable(stage.name))
            lines = [
                el("tr", el("th", title, colspan=len(columns), scope="rowgroup"), class_="note")
            ]
            for name, scores, is_average in metric_rows(stage.metrics):
                words = scores.get("completion_words")
                text = _text_scores(stage.metrics.get("text"), name)
                lines.append(
                    el(
                        "tr",
                        el("th", el("bdi", readable(name)), scope="row"),
                        *(_cell(scores[m]) for m in MAIN),
                        *(
                            el("td", format_value(scores[m]["value"]))
                            for m in ("format_failure_rate", "judge_failure_rate")
                        ),
                        *(_cell(text[m]) if text and m in text else el("td") for m in text_metrics),
                        el("td", "" if words is None else f"{words:.1f}"),
                        el("td", f"{scores['n']:,}"),
                        class_="average" if is_average else None,
                    )
                )
            bodies.append(el("tbody", *lines))
    return scroll(el("table", el("thead", head), *bodies), "Metrics per data set")


def _text_scores(text: TextMetrics | None, name: str) -> TextScores | None:
    """Text metrics of a data set or of ``mean all``; None where there are none."""
    if text is None:
        return None
    return text["averages"].get("all") if name == "mean all" else text["datasets"].get(name)


def comparison(names: tuple[str, str], compared: Comparison) -> Markup:
    """Paired differences, second minus first, of every data set and average."""
    head = el(
        "tr",
        el("th", ""),
        *(el("th", title, scope="col") for title in MAIN.values()),
        el("th", "images", scope="col"),
        el("th", "changed", scope="col"),
    )
    lines = []
    for name, difference in compared["differences"].items():
        cells = []
        for metric in MAIN:
            d = difference[metric]
            sign = "up" if (d["low"] or 0) > 0 else "down" if (d["high"] or 0) < 0 else None
            cell = _cell(d, is_signed=True)
            cells.append(Markup(cell.replace("<td>", f'<td class="{sign}">', 1)) if sign else cell)
        lines.append(
            el(
                "tr",
                el("th", el("bdi", readable(name)), scope="row"),
                *cells,
                el("td", f"{difference['n_images']:,}"),
                el("td", _count(difference["discordant"])),
            )
        )
    caption = el(
        "p",
        el("bdi", names[1]),
        " minus ",
        el("bdi", names[0]),
        ": over the images both answered; coloured where the 95 % interval excludes 0. Changed: "
        "images wrong on one side only; where counted, correctness has Tango's score interval, all "
        "else the paired bootstrap's.",
        class_="caption",
    )
    table = el("table", el("thead", head), el("tbody", *lines))
    return join(caption, scroll(table, "Differences"))


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def _matrix(
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    counts: np.ndarray,
    caption: str,
    diagonal: bool,
) -> Markup:
    """A table of counts, shaded by the share of its row."""
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    head = el("tr", el("th", corner, scope="col"), *(el("th", c, scope="col") for c in columns))
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for j in range(len(columns)):
            better = "same" if not diagonal or rows[i] == columns[j] else "other"
            cells.append(
                el(
                    "td",
                    f"{int(counts[i, j]):,}" if counts[i, j] else "·",
                    style=f"--a:{shares[i, j]:.2f}",
                    class_=f"heat {better}",
                    title=f"{shares[i, j]:.0%} of the row",
                )
            )
        lines.append(el("tr", el("th", row, scope="row"), *cells))
    table = el("table", el("thead", head), el("tbody", *lines), class_="matrix")
    return join(el("p", caption, class_="caption"), scroll(table, caption))


def transitions(base: Sequence[Prediction], final: Sequence[Prediction], title: str) -> Markup:
    """What became of the base's categories on the same images (first sample of each)."""

    def first(rows: Sequence[Prediction]) -> dict[tuple[str, str], int]:
        return {p.image_key: p.rung for p in sorted(rows, key=lambda p: -p.sample_index)}

    before, after = first(base), first(final)
    counts = np.zeros((len(RUNGS), len(RUNGS)))
    for key in before.keys() & after.keys():
        counts[before[key], after[key]] += 1
    used = [i for i in range(len(RUNGS)) if counts[i].any() or counts[:, i].any()]
    names = [readable(RUNGS[i]) for i in used]
    return _matrix("before ↓ after →", names, names, counts[np.ix_(used, used)], title, True)


def level_confusion(confusion: Confusion, title: str) -> Markup:
    """How narrow answers are, against how near they are to the truth."""
    rows = [r for r in confusion.levels if any(confusion.counts[r, c] for c in confusion.relations)]
    counts = np.array([[confusion.counts[r, c] for c in confusion.relations] for r in rows], float)
    if not rows:
        return el("p", "No answer could be placed in the tree of names.")
    if confusion.skipped:
        title += f" Not placed, their truth is not in the tree: {confusion.skipped:,}."
    return _matrix("answer names ↓", rows, confusion.relations, counts, title, False)
