"""Charts of finished evaluations: where runs stand, what they answer, what best-of-k would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from speciarl_jax.report.sections import PUBLISHED
from speciarl_jax.report.style import LIGHT, line_color, readable
from speciarl_jax.scoring.predictions import RUNGS
from speciarl_jax.scoring.results import CurvePoint, MainMetric, Scores


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation in the correctness-specificity plane."""

    label: str
    run: int  # number of the run, for the colour
    scores: Scores
    is_base: bool = False  # drawn hollow

    @property
    def place(self) -> tuple[float, float] | None:
        """(correctness, specificity), None if one is undefined."""
        c, s = self.scores["correctness"]["value"], self.scores["specificity"]["value"]
        return None if c is None or s is None else (c, s)


def draw_plane(ax: Axes, points: Sequence[Point], title: str, *, has_published: bool) -> bool:
    """Scatter with intervals over HM contours, an arrow from each run's base to its last point.

    Points of a run follow each other; `has_published` adds the paper's rows as small diamonds.
    """
    known = [(p, p.place) for p in points if p.place is not None]
    if not known:
        return False
    published = [(p.correctness, p.specificity) for p in PUBLISHED] if has_published else []
    xs, ys = zip(*(xy for _, xy in known), *published, strict=True)
    ax.set_xlim(*_padded(xs))
    ax.set_ylim(*_padded(ys))
    _contours(ax)
    for row, (x, y) in zip(PUBLISHED, published, strict=False):
        ax.plot(x, y, marker="D", color=LIGHT["muted"], markersize=4, linestyle="none")
        ax.annotate(row.name, (x, y), (5, -3), textcoords="offset points", fontsize=7.5,
                    color=LIGHT["muted"])  # fmt: skip
    for i, (p, (x, y)) in enumerate(known):
        _point(ax, p, x, y, _neighbours(ax, (x, y), [xy for _, xy in known[:i]]))
    for run in {p.run for p, _ in known}:
        own = [xy for p, xy in known if p.run == run]
        if len(own) > 1:
            ax.annotate("", own[-1], own[0], arrowprops={
                "arrowstyle": "->", "color": line_color(run), "shrinkA": 7, "shrinkB": 7,
                "linewidth": 1.3, "linestyle": "--"})  # fmt: skip
    ax.set_xlabel("correctness")
    ax.set_ylabel("specificity")
    ax.set_title(title)
    return True


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(0.06, 0.2 * (high - low))
    return max(0.0, low - pad), min(1.01, high + pad)


def _contours(ax: Axes) -> None:
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    c, s = np.meshgrid(np.linspace(max(x0, 0.01), x1, 120), np.linspace(max(y0, 0.01), y1, 120))
    step = 0.1 if max(x1 - x0, y1 - y0) > 0.35 else 0.05
    lines = ax.contour(c, s, 2 * c * s / (c + s), levels=np.arange(step, 1.0, step),
                       colors=LIGHT["grid"], linewidths=1.0)  # fmt: skip
    ax.grid(visible=False)
    ax.clabel(lines, fmt=lambda v: f"HM {v:.2f}", fontsize=7.5, colors=LIGHT["muted"])


def _neighbours(
    ax: Axes, place: tuple[float, float], earlier: Sequence[tuple[float, float]]
) -> int:
    """How many labels are there already, so that the next one goes above them."""
    spans = [np.ptp(ax.get_xlim()) / 6, np.ptp(ax.get_ylim()) / 20]
    return sum(
        all(abs(a - b) < span for a, b, span in zip(place, other, spans, strict=True))
        for other in earlier
    )


def _point(ax: Axes, p: Point, x: float, y: float, labels_below: int) -> None:
    errors: list[list[list[float]] | None] = []
    for estimate, value in ((p.scores["correctness"], x), (p.scores["specificity"], y)):
        low, high = estimate["low"], estimate["high"]
        if low is None or high is None:
            errors.append(None)
        else:
            errors.append([[max(0, value - low)], [max(0, high - value)]])
    colour = line_color(p.run)
    ax.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", markersize=8, color=colour,
                markerfacecolor=LIGHT["paper"] if p.is_base else colour, elinewidth=1.0,
                zorder=3)  # fmt: skip
    ax.annotate(p.label, (x, y), (8, 7 + 11 * labels_below), textcoords="offset points",
                fontsize=9, color=colour, fontweight="bold")  # fmt: skip


def draw_shares(ax: Axes, bars: Sequence[tuple[str, Mapping[str, float]]], title: str) -> bool:
    """Horizontal stacked bars of category shares, one per (label, category_fracs)."""
    if not bars:
        return False
    present = [r for r in RUNGS if any(shares.get(r, 0) > 0 for _, shares in bars)]
    y = np.arange(len(bars))[::-1]
    left = np.zeros(len(bars))
    for rung in present:
        width = np.array([shares.get(rung, 0.0) for _, shares in bars])
        ax.barh(y, width, left=left, color=LIGHT[rung], label=readable(rung), height=0.72,
                edgecolor=LIGHT["paper"], linewidth=0.7)  # fmt: skip
        left += width
    ax.set_yticks(y, [label for label, _ in bars])
    ax.set_xlim(0, max(1e-9, float(left.max())))
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.set_title(title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.35 / len(bars)),
              ncols=min(len(present), 4))  # fmt: skip
    return True


def draw_best_of(
    ax: Axes, curves: Mapping[str, Sequence[CurvePoint]], metric: MainMetric, title: str
) -> bool:
    """A metric of the best of k answers over k, with its interval as a band."""
    index = 0
    for label, curve in curves.items():
        known = [p for p in curve if p[metric]["value"] is not None]
        if not known:
            continue
        k = [p["k"] for p in known]
        value, low, high = (  # an undefined end is nan
            np.array([p[metric][side] for p in known], float) for side in ("value", "low", "high")
        )
        ax.plot(k, value, marker="o", markersize=3.5, label=label, color=line_color(index))
        if np.isfinite(low + high).all():
            ax.fill_between(k, low, high, color=line_color(index), alpha=0.15, linewidth=0)
        index += 1
    if not index:
        return False
    ax.set_xscale("log", base=2)
    sizes = sorted({p["k"] for curve in curves.values() for p in curve})
    ax.set_xticks(sizes, [str(k) for k in sizes])
    ax.minorticks_off()
    ax.set_xlabel("k, answers per image")
    ax.set_title(title)
    if index > 1:
        ax.legend()
    return True
