"""Charts of the page: one figure each, and the section of curves over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from speciarl_jax.report import curves
from speciarl_jax.report.html import Markup, el
from speciarl_jax.report.load import Run, Series
from speciarl_jax.report.style import chart, to_svg

METRICS = {"specificity": "Specificity", "correctness": "Correctness", "hm": "HM"}


def figure(
    label: str, caption: str, draw: Callable[[Axes], bool], width: float = 4.6, height: float = 3.0
) -> Markup | None:
    """One chart, or None where there was nothing to draw.

    Args:
        label: for screen readers.
        caption: below the chart; empty for none.
        draw: draws into the axes and says whether it did.
        width: inches of the drawing, which sets how large its text is.
        height: likewise.
    """
    with chart(width=width, height=height) as (drawing, [ax]):
        if not draw(ax):
            return None
        svg = Markup(to_svg(drawing, label))
    css = "wide" if width > 6 else None
    return el("figure", svg, el("figcaption", caption) if caption else None, class_=css)


def training_section(runs: Sequence[Run]) -> Markup | None:
    """Curves over steps of all runs; None if no run has any."""
    series = {r.name: r.series for r in runs if r.series}
    if not series:
        return None
    figures: list[Markup | None] = []

    def add(title: str, names: Sequence[str], floor: bool = False) -> None:
        figures.append(
            figure(title, "", lambda ax: curves.draw_named(ax, series, names, title, floor=floor))
        )

    add("Mean reward", ["reward/mean"])
    for metric, title in METRICS.items():
        figures.append(_metric_figure(series, metric, f"{title} while training"))
    for name, one in series.items():
        title = "Categories of sampled answers" + (f" · {name}" if len(series) > 1 else "")
        figures.append(_categories_figure(one, title))
    add("KL to the reference", ["policy/kl"], floor=True)
    add("Entropy", ["policy/entropy"], floor=True)
    lengths = dict.fromkeys(n for s in series.values() for n in curves.length_names(s))
    if len(series) > 1:  # the spread of several runs would be a tangle
        lengths = dict.fromkeys(n for n in lengths if n.endswith("_mean"))
    add("Length (tokens)", list(lengths))
    add("Share of the step spent waiting for the judge", ["judge/wait_frac"], floor=True)
    for name, one in series.items():
        title = "Time per step" + (f" · {name}" if len(series) > 1 else "")
        figures.append(_time_figure(one, title))
    grid = el("div", *figures, class_="charts")
    return el("section", el("h2", "Training"), grid, id="training")


def _metric_figure(series: Mapping[str, Series], metric: str, title: str) -> Markup | None:
    return figure(title, "", lambda ax: curves.draw_metric(ax, series, metric, title))


def _categories_figure(series: Series, title: str) -> Markup | None:
    return figure(title, "", lambda ax: curves.draw_categories(ax, series, title))


def _time_figure(series: Series, title: str) -> Markup | None:
    return figure(title, "", lambda ax: curves.draw_time(ax, series, title))
