"""Lines and tables of a step, for a terminal or a log."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from speciarl_jax.timing import format_seconds
from speciarl_jax.types import Failure, Rollout

_LOG_COLUMNS = 120


def step_line(row: Mapping[str, float], num_steps: int, eta_s: float) -> str:
    """``step 12/100  reward .53  spec 41% ...``: what a person watches."""
    shares = " ".join(
        f"{label} {row.get(f'category/{name}_frac', 0):.0%}"
        for label, name in (
            ("wrong", "wrong"),
            ("generic", "generic"),
            ("less", "less_specific"),
            ("specific", "specific"),
        )
    )
    return (
        f"step {int(row['step'])}/{num_steps}  reward {row['reward/mean']:+.3f}  {shares}  "
        f"kl {row.get('policy/kl', 0):.4f}  grad {row['policy/grad_norm']:.3f}  "
        f"{row['throughput/tokens_per_s']:.0f} tok/s  {row['time/step_s']:.1f}s  "
        f"eta {format_seconds(eta_s)}"
    )


def rollout_table(groups: Sequence[Sequence[Rollout]], step: int, num_rows: int = 8) -> Table:
    """Ground truth, prediction, category and reward of the first answers of a few groups."""
    table = Table(title=f"rollouts of step {step}", title_justify="left")
    for column in ("ground truth", "prediction", "category", "reward", "advantage"):
        table.add_column(column, justify="right" if column in ("reward", "advantage") else "left")
    for group in groups[:num_rows]:
        rollout = group[0]
        table.add_row(
            escape(rollout.ground_truth),
            escape((rollout.prediction or "(no answer)")[:60]),
            outcome_name(rollout),
            f"{rollout.reward:+.2f}",
            f"{rollout.advantage:+.2f}",
        )
    return table


def outcome_name(rollout: Rollout) -> str:
    """Its category, or the kind of failure."""
    if rollout.prediction is None:
        return "format failure"
    if isinstance(rollout.outcome, Failure):
        return f"judge failure: {rollout.outcome.kind.value}"
    return rollout.category.label if rollout.category is not None else "unlabelled"


def make_console() -> Console:
    """Console for lines and tables: colours on a terminal, plain text 120 wide in a log."""
    width = None if sys.stdout.isatty() else _LOG_COLUMNS
    return Console(highlight=False, soft_wrap=True, width=width)
