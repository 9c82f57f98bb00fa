"""Curves over training steps. Every function draws into given axes and says whether it drew.

`runs` maps a run's name to its series (`read_series`); with one run the lines of a panel
are its metrics, with several each run has its own colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from speciarl_jax.report.load import Series
from speciarl_jax.report.style import LIGHT, line_color, readable
from speciarl_jax.scoring.predictions import RUNGS

AVERAGES = ("out_of_domain", "in_domain", "fine_grained", "very_fine_grained", "all")
_WINDOW = 5  # steps in the moving average drawn over the raw values
_MOST = 600  # points of a line
Points: TypeAlias = Sequence[tuple[int, float]]  # (step, value)


def _thin(points: Points) -> Points:
    """Evenly chosen points, the last one included, so that a long run stays a small drawing."""
    if len(points) <= _MOST:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, _MOST).astype(int)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average, shorter at the ends."""
    window = np.ones(min(_WINDOW, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _line(ax: Axes, points: Points, label: str, colour: str, *, is_noisy: bool) -> None:
    x, y = np.array(_thin(points), float).T
    if is_noisy and len(y) >= 2 * _WINDOW:
        ax.plot(x, y, color=colour, alpha=0.28, linewidth=1.0)
        ax.plot(x, _smooth(y), color=colour, label=label)
    else:
        marker = "o" if len(y) < 12 else None
        ax.plot(x, y, color=colour, label=label, marker=marker, markersize=3.5)


def _finish(ax: Axes, title: str, *, has_legend: bool = True) -> None:
    ax.set_title(title)
    ax.set_xlabel("step")
    if not ax.patches:  # bars have names below them, not steps
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.margins(x=0.02)
    if has_legend and len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()


def draw_named(
    ax: Axes, runs: Mapping[str, Series], names: Sequence[str], title: str, *, floor: bool = False
) -> bool:
    """Draws metrics by name, one line per run and metric that it has; labels say what differs.

    `floor` puts 0 at the bottom.
    """
    present = [n for n in names if any(n in series for series in runs.values())]
    lines = []
    for run, series in runs.items():
        for name in filter(series.__contains__, present):
            short = readable(name.split("/", 1)[-1])
            label = short if len(runs) == 1 else run if len(present) == 1 else f"{run}: {short}"
            lines.append((label, series[name]))
    for i, (label, points) in enumerate(lines):
        _line(ax, points, label, line_color(i), is_noisy=True)
    if lines and floor:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    _finish(ax, title)
    return bool(lines)


def eval_groups(series: Series) -> list[str]:
    """Averages that were evaluated while training, or the data sets where there is none."""
    groups = list(dict.fromkeys(n.split("/")[1] for n in series if n.count("/") == 2
                                and n.startswith("eval/")))  # fmt: skip
    averages = [a for a in AVERAGES if a in groups]
    if {"in_domain", "out_of_domain"} <= set(averages):
        averages = [a for a in averages if a != "all"]
    return averages or groups


def draw_metric(ax: Axes, runs: Mapping[str, Series], metric: str, title: str) -> bool:
    """Draws one evaluation metric over steps, a line per run and average."""
    lines = [
        (readable(group) if len(runs) == 1 else f"{run}: {readable(group)}", series[name])
        for run, series in runs.items()
        for group in eval_groups(series)
        if (name := f"eval/{group}/{metric}") in series
    ]
    for i, (label, points) in enumerate(lines):
        _line(ax, points, label, line_color(i), is_noisy=False)
    _widen(ax)
    _finish(ax, title)
    return bool(lines)


def _widen(ax: Axes, span: float = 0.1) -> None:
    """Keeps noise small: a share's axis covers at least `span`."""
    low, high = ax.get_ylim()
    if high - low < span:
        low = max(0.0, min((low + high - span) / 2, 1.0 - span))
        ax.set_ylim(low, low + span)


def _columns(series: Series, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that any of the metrics has, and [names, steps] values; 0 where one lacks a step."""
    points = [dict(series[n]) for n in names]
    steps = sorted(set().union(*points))
    values = [[p.get(step, 0.0) for step in steps] for p in points]
    return np.array(steps, float), np.array(values)


def draw_categories(ax: Axes, series: Series, title: str) -> bool:
    """Draws the shares of the categories, stacked, best on top of worst."""
    present = [r for r in RUNGS if f"category/{r}_frac" in series]
    if not present:
        return False
    x, shares = _columns(series, [f"category/{r}_frac" for r in present])
    if len(x) >= 2 * _WINDOW:
        shares = np.array([_smooth(row) for row in shares])
    if len(x) == 1:
        x, shares = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(shares, 2, axis=1)
    colours, labels = [LIGHT[r] for r in present], [readable(r) for r in present]
    ax.stackplot(x, shares, colors=colours, labels=labels, edgecolor=LIGHT["paper"], linewidth=0.5)
    ax.set_ylim(0, max(1e-9, float(shares.sum(0).max())))
    ax.set_xlim(x[0], x[-1])
    ax.grid(visible=False)
    _finish(ax, title, has_legend=False)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def draw_time(ax: Axes, series: Series, title: str) -> bool:
    """Draws seconds per step, stacked by part."""
    names = [n for n in series if n.startswith("time/") and n.endswith("_s")]
    parts = [n for n in names if not n.endswith(("step_s", "total_s"))] or names
    if not parts:
        return False
    steps, seconds = _columns(series, parts)
    labels = [readable(n.removeprefix("time/").removesuffix("_s")) for n in parts]
    colours = [line_color(i) for i in range(len(parts))]
    if len(steps) < 2:
        ax.bar(labels, seconds[:, 0], color=colours)
    else:
        ax.stackplot(steps, seconds, labels=labels, colors=colours, alpha=0.85)
        # The first step compiles; it must not flatten all the others.
        ax.set_ylim(0, 1.25 * float(np.percentile(seconds.sum(0), 97)) or 1.0)
    ax.set_ylabel("s")
    _finish(ax, title)
    return True


def length_names(series: Series) -> list[str]:
    """Names of the token lengths worth a curve: the mean, and how far the lengths spread."""
    ends = ("tokens_mean", "tokens_p10", "tokens_p90")
    return [n for n in series if n.startswith("rollout/") and n.endswith(ends)]
