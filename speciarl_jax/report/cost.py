"""The section on what runs cost, and their recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from speciarl_jax.report import sections
from speciarl_jax.report.html import Markup, el
from speciarl_jax.report.load import Run, Series

_FACTS = {
    "throughput/tokens_per_s_per_chip": "tokens per second and chip",
    "throughput/mfu": "model FLOPs utilisation",
    "judge/wait_frac": "step spent waiting for the judge",
    "judge/failed_frac": "labels that failed",
    "judge/cache_hit_frac": "labels from the cache",
}


def cost_section(runs: Sequence[Run]) -> Markup:
    """Steps, time, throughput and the judge's share, side by side; then the recipes."""
    head = el("tr", el("th", ""), *(el("th", el("bdi", r.name), scope="col") for r in runs))
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{len(r.series.get('reward/mean', [])):,}" for r in runs]),
        ("time in steps", [_hours(_seconds(r.series)) for r in runs]),
        ("rollouts kept", [f"{len(r.rollouts):,}" for r in runs]),
    ]
    for name, text in _FACTS.items():
        values = [[v for _, v in r.series.get(name, [])] for r in runs]
        if any(values):
            rows.append((f"{text} (median)", [f"{np.median(v):.4g}" if v else "" for v in values]))
    lines = [
        el("tr", el("th", text, scope="row"), *(el("td", c) for c in cells)) for text, cells in rows
    ]
    configs = [
        el(
            "details",
            el("summary", "Recipe of ", el("bdi", r.name)),
            el("pre", json.dumps(r.config, indent=2, ensure_ascii=False)),
        )
        for r in runs
        if r.config
    ]
    table = sections.scroll(el("table", el("thead", head), el("tbody", *lines)), "Cost")
    return el("section", el("h2", "Cost and recipe"), table, *configs, id="cost")


def _seconds(series: Series) -> float:
    for name in ("time/step_s", "time/total_s"):
        if name in series:
            return sum(v for _, v in series[name])
    return sum(v for n, points in series.items() if n.startswith("time/") for _, v in points)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
