"""Training curves as PNG files, for a README or a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from speciarl_jax.report import curves
from speciarl_jax.report.load import read_series
from speciarl_jax.report.style import chart, save_png
from speciarl_jax.report.tables import MAIN


def plot_training(metrics_jsonl: str | Path, out_dir: str | Path) -> list[Path]:
    """Draws the curves of one run; panels without data are left empty, files without are skipped.

    Returns:
        The files written: reward.png, metrics.png, categories.png, policy.png, and training.png
        which has the reward, the HM and the categories side by side.

    Raises:
        ValueError: no such file or a bad line.
    """
    series = read_series(metrics_jsonl)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    named = partial(curves.draw_named, runs={"": series})
    metric = partial(curves.draw_metric, runs={"": series})
    categories = partial(curves.draw_categories, series=series)
    reward = partial(named, names=["reward/mean"], title="Mean reward")
    policy = [
        partial(named, names=["policy/kl"], title="KL to the reference", floor=True),
        partial(named, names=["policy/entropy"], title="Entropy", floor=True),
        partial(named, names=curves.length_names(series), title="Length (tokens)"),
        partial(curves.draw_time, series=series, title="Time per step"),
    ]
    answers = partial(categories, title="Categories of the sampled answers")
    overview = [
        reward,
        partial(metric, metric="hm", title="HM on held-out images"),
        partial(categories, title="Categories"),
    ]
    metrics = [partial(metric, metric=name, title=title) for name, title in MAIN.items()]
    return [
        *_save(out_dir / "reward.png", (1, 1), (5.6, 3.2), [reward]),
        *_save(out_dir / "metrics.png", (1, 3), (3.8, 3.0), metrics),
        *_save(out_dir / "categories.png", (1, 1), (6.4, 3.4), [answers]),
        *_save(out_dir / "policy.png", (2, 2), (4.4, 2.7), policy),
        *_save(out_dir / "training.png", (1, 3), (4.2, 3.1), overview),
    ]


def _save(
    path: Path,
    shape: tuple[int, int],
    size: tuple[float, float],
    panels: Sequence[Callable[[Axes], bool]],
) -> list[Path]:
    """Rows x columns of panels, each of a size in inches; [] if there is nothing in any."""
    with chart(*shape, *size) as (figure, axes):
        is_drawn = [draw(ax) for draw, ax in zip(panels, axes, strict=True)]
        if not any(is_drawn):
            return []
        save_png(figure, path)
    return [path]
