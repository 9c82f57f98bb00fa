"""Charts of the page: one figure each, and the section of curves over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes

from speciarl_jax.report import curves
from speciarl_jax.report.html import Markup, el
from speciarl_jax.report.load import Run
from speciarl_jax.report.style import chart, to_svg
from speciarl_jax.report.tables import MAIN


def figure(
    label: str, caption: str, draw: Callable[[Axes], bool], width: float = 4.6, height: float = 3.0
) -> Markup | None:
    """One chart, or None where there was nothing to draw.

    Args:
        label: for screen readers.
        caption: below the chart; empty for none.
        draw: draws into the axes and says whether it did.
        width, height: inches of the drawing, which set how large its text is.
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

    def add(title: str, draw: partial[bool]) -> None:
        figures.append(figure(title, "", lambda ax: draw(ax, title=title)))

    named = partial(curves.draw_named, runs=series)
    add("Mean reward", partial(named, names=["reward/mean"]))
    for metric, title in MAIN.items():
        add(f"{title} while training", partial(curves.draw_metric, runs=series, metric=metric))
    whose = {name: f" · {name}" if len(series) > 1 else "" for name in series}
    for name, one in series.items():
        title = "Categories of sampled answers" + whose[name]
        add(title, partial(curves.draw_categories, series=one))
    add("KL to the reference", partial(named, names=["policy/kl"], floor=True))
    add("Entropy", partial(named, names=["policy/entropy"], floor=True))
    lengths = dict.fromkeys(n for s in series.values() for n in curves.length_names(s))
    if len(series) > 1:  # the spread of several runs would be a tangle
        lengths = dict.fromkeys(n for n in lengths if n.endswith("_mean"))
    add("Length (tokens)", partial(named, names=list(lengths)))
    waiting = "Share of the step spent waiting for the judge"
    add(waiting, partial(named, names=["judge/wait_frac"], floor=True))
    for name, one in series.items():
        add("Time per step" + whose[name], partial(curves.draw_time, series=one))
    grid = el("div", *figures, class_="charts")
    return el("section", el("h2", "Training"), grid, id="training")
