"""Training curves as PNG files, for a README or a log."""

from __future__ import annotations

from pathlib import Path

from speciarl_jax.report import curves
from speciarl_jax.report.load import Series, read_series
from speciarl_jax.report.style import chart, save_png

_METRICS = {"specificity": "Specificity", "correctness": "Correctness", "hm": "HM"}


def plot_training(metrics_jsonl: str | Path, out_dir: str | Path) -> list[Path]:
    """Draws the curves of one run; panels without data are left empty, files without are skipped.

    Args:
        metrics_jsonl: the run's ``metrics.jsonl``.
        out_dir: made if missing.

    Returns:
        The files written: reward.png, metrics.png, categories.png, policy.png, and training.png
        which has the reward, the HM and the categories side by side.

    Raises:
        ValueError: no such file or a bad line.
    """
    series = read_series(metrics_jsonl)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = {
        "reward.png": _reward(series, out_dir / "reward.png"),
        "metrics.png": _metrics(series, out_dir / "metrics.png"),
        "categories.png": _categories(series, out_dir / "categories.png"),
        "policy.png": _policy(series, out_dir / "policy.png"),
        "training.png": _overview(series, out_dir / "training.png"),
    }
    return [out_dir / name for name, is_drawn in drawn.items() if is_drawn]


def _reward(series: Series, path: Path) -> bool:
    with chart(width=5.6, height=3.2) as (figure, [ax]):
        is_drawn = curves.draw_named(ax, {"": series}, ["reward/mean"], "Mean reward")
        if is_drawn:
            save_png(figure, path)
    return is_drawn


def _metrics(series: Series, path: Path) -> bool:
    with chart(1, 3, width=3.8, height=3.0) as (figure, axes):
        drawn = [
            curves.draw_metric(ax, {"": series}, metric, title)
            for ax, (metric, title) in zip(axes, _METRICS.items(), strict=True)
        ]
        if any(drawn):
            save_png(figure, path)
    return any(drawn)


def _categories(series: Series, path: Path) -> bool:
    with chart(width=6.4, height=3.4) as (figure, [ax]):
        is_drawn = curves.draw_categories(ax, series, "Categories of the sampled answers")
        if is_drawn:
            save_png(figure, path)
    return is_drawn


def _policy(series: Series, path: Path) -> bool:
    run = {"": series}
    with chart(2, 2, width=4.4, height=2.7) as (figure, axes):
        drawn = [
            curves.draw_named(axes[0], run, ["policy/kl"], "KL to the reference", floor=True),
            curves.draw_named(axes[1], run, ["policy/entropy"], "Entropy", floor=True),
            curves.draw_named(axes[2], run, curves.length_names(series), "Length (tokens)"),
            curves.draw_time(axes[3], series, "Time per step"),
        ]
        if any(drawn):
            save_png(figure, path)
    return any(drawn)


def _overview(series: Series, path: Path) -> bool:
    run = {"": series}
    with chart(1, 3, width=4.2, height=3.1) as (figure, axes):
        drawn = [
            curves.draw_named(axes[0], run, ["reward/mean"], "Mean reward"),
            curves.draw_metric(axes[1], run, "hm", "HM on held-out images"),
            curves.draw_categories(axes[2], series, "Categories"),
        ]
        if any(drawn):
            save_png(figure, path)
    return any(drawn)
