"""The report: one static HTML page from one or several run directories.

The page needs nothing but itself. Its only script is fixed and allowed by hash in the
content-security policy; what a model wrote reaches the page as base64 data or as escaped text.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from speciarl_jax.judge.offline.name_trees import read_any
from speciarl_jax.report import charts, sections
from speciarl_jax.report.compare import compare, scoring_rule
from speciarl_jax.report.cost import cost_section
from speciarl_jax.report.gallery import Gallery, build_gallery
from speciarl_jax.report.html import Markup, el, join
from speciarl_jax.report.levels import NameTree
from speciarl_jax.report.load import Run, Stage
from speciarl_jax.report.style import DARK, LIGHT, readable
from speciarl_jax.report.training import figure, training_section
from speciarl_jax.report.verdicts import judge_section
from speciarl_jax.scoring.predictions import RUNGS

_SHARED = 1_200_000  # bytes kept free for tables, charts and script
_NAV = {
    "results": "Results",
    "training": "Training",
    "answers": "Answers",
    "judge": "Judge",
    "cost": "Cost",
}


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What the reader of a report may choose."""

    title: str = "SpeciaRL run"
    taxonomy: Path | None = None  # tree of names for the confusion by level; None leaves it out
    max_rollouts: int = 20_000  # rows in the gallery at most
    max_mb: float = 25.0  # size of the page at most, in 1e6 bytes
    bootstrap_samples: int = 0  # behind paired differences; 0 takes the first run's


def build_page(runs: Sequence[Run], options: ReportOptions) -> str:
    """The whole page as text; the run that the report is about comes first.

    Raises:
        ValueError: a budget that holds nothing, or runs without a common image.
    """
    budget = int(options.max_mb * 1e6) - _SHARED
    if budget < 1_000_000 or options.max_rollouts < 1:
        raise ValueError(
            f"max_mb={options.max_mb:g}, max_rollouts={options.max_rollouts}: "
            "a page needs at least 3 MB and 1 rollout"
        )
    gallery = build_gallery(runs, options.max_rollouts, budget)
    script, style = _static("page.js"), _theme() + _static("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = join(
        el("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", options.title),
        el("style", Markup(style)),
    )
    parts = {
        "results": _results(runs, options),
        "training": training_section(runs),
        "answers": _answers(gallery),
        "judge": judge_section(runs),
        "cost": cost_section(runs),
    }
    body = join(
        _header(runs, options.title, [name for name, part in parts.items() if part is not None]),
        el("main", *parts.values()),
        el("footer", "Made by speciarl report. Works from a file, without a network."),
        *(_data(name, getattr(gallery, name)) for name in ("index", "completions", "images")),
        el("script", Markup(script)),
    )
    page = el("html", el("head", head), el("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _static(name: str) -> str:
    return (resources.files("speciarl_jax.report") / "static" / name).read_text(encoding="utf-8")


def _theme() -> str:
    """CSS variables of both themes; print is always light."""

    def variables(colours: Mapping[str, str]) -> str:
        return "".join(f"--{n.replace('_', '-')}:{c};" for n, c in colours.items())

    light, dark = variables(LIGHT), variables(DARK)
    return (
        f":root{{{light}color-scheme:light}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{{dark}color-scheme:dark}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}color-scheme:dark}}}}\n"
    )


def _data(name: str, text: str) -> Markup:
    return el("script", Markup(text), type="application/octet-stream", id=f"data-{name}")


def _header(runs: Sequence[Run], title: str, parts: Sequence[str]) -> Markup:
    links = [el("a", _NAV[part], href=f"#{part}") for part in parts]
    toggle = el("button", "◐", type="button", id="theme", aria_label="Switch dark and light")
    names = [
        el("li", el("bdi", r.name), " · ", _extent(r), class_=f"run{i % 6}")
        for i, r in enumerate(runs)
    ]
    return join(
        el("a", "Skip to results", href="#results", class_="skip"),
        el("header", el("h1", title), el("ul", *names, class_="runs")),
        el("nav", *links, toggle, aria_label="Sections"),
    )


def _extent(run: Run) -> str:
    """How much there is of a run, in words."""
    steps = max((points[-1][0] for points in run.series.values()), default=0)
    images = len({p.image_key for s in run.stages for p in s.predictions})
    datasets = len({d for s in run.stages for d in s.metrics["datasets"]})
    rollouts = len(run.rollouts) + sum(len(s.predictions) for s in run.stages)
    counts = (
        (steps, "steps"),
        (datasets, "data sets"),
        (images, "test images"),
        (rollouts, "rollouts"),
    )
    return " · ".join(f"{n:,} {what}" for n, what in counts if n)


def _results(runs: Sequence[Run], options: ReportOptions) -> Markup:
    staged = [r for r in runs if r.stages]
    if not staged:
        return el(
            "section", el("h2", "Results"), el("p", "Nothing was evaluated yet."), id="results"
        )
    return el(
        "section",
        el("h2", "Results"),
        sections.headline(staged),
        _differences(staged, options),
        el("div", _plane(staged), _best_of(staged), class_="charts"),
        _shares(staged),
        _what_changed(staged, options),
        el(
            "details",
            el("summary", "Every data set"),
            sections.per_dataset(staged),
        ),
        id="results",
    )


def _differences(runs: Sequence[Run], options: ReportOptions) -> Markup:
    """Trained against base within each run, then each run against the first.

    All of them by the rule that the first run was scored with, so that its intervals are those of
    its ``metrics.json``.
    """
    pairs: list[tuple[str, Stage, str, Stage]] = []
    for run in runs:
        if run.change is not None:
            (base, final), prefix = run.change, _prefix(run, runs)
            pairs.append((f"{prefix}{base.name}", base, f"{prefix}{final.name}", final))
    finals = [(f"{r.name} · {r.final.name}", r.final) for r in runs if r.final is not None]
    pairs += [(*finals[0], *other) for other in finals[1:]]
    tables = []
    main = finals[0][1]
    rule = scoring_rule([main], bootstrap_samples=options.bootstrap_samples)
    for a, first, b, second in pairs:
        images_a, images_b = ({p.image_key for p in s.predictions} for s in (first, second))
        if images_a.isdisjoint(images_b):
            tables.append(el("p", f"{a} and {b} have no image in common."))
            continue
        compared = compare(first.predictions, second.predictions, main.in_domain, rule)
        tables.append(sections.comparison((a, b), compared))
    return join(*tables)


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    """What a heading says of a run where there are several."""
    return f"{run.name} · " if len(runs) > 1 else ""


def _who(run: Run, stage: Stage, runs: Sequence[Run]) -> str:
    """A label in a chart; it names the run where there are several."""
    return readable(stage.name) if len(runs) == 1 else f"{run.name} {readable(stage.name)}"


def _plane(runs: Sequence[Run]) -> Markup | None:
    average = sections.headline_average(runs)
    points = [
        charts.Point(_who(r, s, runs), i, s.metrics["averages"][average], s.name == "base")
        for i, r in enumerate(runs)
        for s in r.stages
        if s.name != "best_of" and average in s.metrics["averages"]
    ]
    title = f"Correctness and specificity, mean {readable(average)}"
    caption = "Bars: 95 % intervals. Lines join points of equal HM; up and right is better."
    has_published = average == "fine_grained"
    return figure(
        "Correctness against specificity",
        caption,
        lambda ax: charts.draw_plane(ax, points, title, has_published=has_published),
        width=5.0,
        height=3.9,
    )


def _best_of(runs: Sequence[Run]) -> Markup | None:
    average = sections.headline_average(runs)
    curves = {
        f"{run.name} {readable(stage.name)}": curve
        for run in runs
        for stage in run.stages
        if (curve := stage.best_of_curve(average))
    }
    title = f"HM of the best of k answers, mean {readable(average)}"
    caption = "What an oracle would score that picks the best of k answers; unbiased for each k."
    return figure(
        "Best of k",
        caption,
        lambda ax: charts.draw_best_of(ax, curves, "hm", title),
        width=5.0,
        height=3.9,
    )


def _shares(runs: Sequence[Run]) -> Markup | None:
    bars = []
    datasets = dict.fromkeys(d for r in runs for s in r.stages for d in s.metrics["datasets"])
    for dataset in datasets:
        for run in runs:
            for stage in run.stages:
                scores = stage.metrics["datasets"].get(dataset)
                if stage.name != "best_of" and scores and "category_fracs" in scores:
                    label = f"{readable(dataset)} · {_who(run, stage, runs)}"
                    bars.append((label, scores["category_fracs"]))
    return figure(
        "Categories per data set",
        "",
        lambda ax: charts.draw_shares(ax, bars, "What the answers are"),
        width=9.6,
        height=1.1 + 0.3 * len(bars),
    )


def _what_changed(runs: Sequence[Run], options: ReportOptions) -> Markup:
    tree = None
    if options.taxonomy is not None and options.taxonomy.exists():
        tree = NameTree(read_any(options.taxonomy))
    blocks = []
    for run in runs:
        prefix = _prefix(run, runs)
        if run.change is not None:
            base, final = run.change
            title = f"{prefix}What became of the answers of base (shades: share of the row)"
            blocks.append(sections.transitions(base.predictions, final.predictions, title))
        if tree is not None and run.final is not None:
            blocks.append(_levels(prefix, run.change or [run.final], tree))
    return el("div", *blocks, class_="matrices")


def _levels(prefix: str, stages: Sequence[Stage], tree: NameTree) -> Markup:
    """Confusion by level of each evaluation, one below the other."""
    tables = []
    for stage in stages:
        confusion = tree.confusion(stage.predictions)
        if confusion.counts:
            title = f"{prefix}{readable(stage.name)}: how narrow answers are, and how near."
            tables.append(sections.level_confusion(confusion, title))
    return el("div", *tables)


def _answers(gallery: Gallery) -> Markup:
    chips = [
        el(
            "button",
            el("i", class_=f"dot {rung.replace('_', '-')}"),
            readable(rung),
            el("output", ""),
            type="button",
            class_="chip",
            data_code=code,
            aria_pressed="false",
        )
        for code, rung in enumerate(RUNGS)
    ]
    filters = el(
        "form",
        el("label", "Show", el("select", id="stage")),
        el("label", "Data set", el("select", id="dataset")),
        el("label", "Sort", el("select", id="sort")),
        el(
            "label",
            "Find",
            el("input", id="find", type="search", placeholder="truth or answer  ( / )"),
        ),
        el("fieldset", el("legend", "Categories"), *chips),
        id="filters",
        autocomplete="off",
    )
    return el(
        "section",
        el("h2", "Answers"),
        el("p", " ".join(gallery.notes), class_="muted") if gallery.notes else None,
        filters,
        el("p", "Reading the answers …", id="status", role="status"),
        el("div", id="gallery", role="list", aria_label="Answers"),
        el("p", f"{gallery.shown:,} rollouts can be browsed in the page itself.", class_="onpaper"),
        el("dialog", el("div", id="detail"), id="dialog", aria_label="Answers to one image"),
        id="answers",
    )
