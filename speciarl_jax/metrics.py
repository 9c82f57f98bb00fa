"""Where numbers go: one readable line a step, JSONL, TensorBoard, tables of rollouts."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from speciarl_jax.types import Category, Failure, Rollout

NONDETERMINISTIC = ("time/", "throughput/", "goodput/", "memory/", "judge/")


def deterministic(row: Mapping[str, float]) -> dict[str, float]:
    """The part of a metrics row that a repeated run reproduces bit for bit on CPU."""
    return {k: v for k, v in row.items() if not k.startswith(NONDETERMINISTIC)}


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and TensorBoard; on resume, rows after a step are cut."""

    def __init__(self, workdir: pathlib.Path, resume_step: int) -> None:
        """Opens the files.

        Args:
            workdir: run directory.
            resume_step: rows of later steps belong to work that was lost; they are removed.
        """
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        _cut_rows(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """Writes one row; it must hold ``step``. The row is on disk when this returns."""
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in row.items():
            if name != "step" and value is not None and np.isfinite(value):
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


def _plain(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if np.isfinite(number) else None


def _cut_rows(path: pathlib.Path, last_step: int) -> None:
    """Keeps whole rows up to a step; a half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a kill cut short; nothing follows it
        if row["step"] <= last_step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def read_rows(path: pathlib.Path) -> list[dict[str, float]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        f"eta {time.strftime('%H:%M:%S', time.gmtime(eta_s))}"
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
            _outcome_name(rollout),
            f"{rollout.reward:+.2f}",
            f"{rollout.advantage:+.2f}",
        )
    return table


def _outcome_name(rollout: Rollout) -> str:
    if rollout.prediction is None:
        return "format failure"
    if isinstance(rollout.outcome, Failure):
        return f"judge failure: {rollout.outcome.kind.value}"
    return rollout.category.label if rollout.category is not None else "unlabelled"


def category_metrics(codes: np.ndarray) -> dict[str, float]:
    """Share of each category among all rollouts, failures included; they add up to 1."""
    from speciarl_jax.reward import FORMAT_FAILURE, UNLABELLED

    names = {category.label: int(category) for category in Category}
    names |= {"format_failure": FORMAT_FAILURE, "judge_failure": UNLABELLED}
    return {f"category/{name}_frac": float(np.mean(codes == code)) for name, code in names.items()}


def make_console() -> Console:
    """Console for lines and tables: colours on a terminal, plain text in a log."""
    return Console(highlight=False, soft_wrap=True)
