"""The open parts of a run, and what it tells the person who started it."""

from __future__ import annotations

import dataclasses
import pathlib

import optax
from rich.console import Console
from rich.table import Table

from speciarl_jax.bootstrap import MAIN_METRICS
from speciarl_jax.checkpoint import Checkpoints, TrainState
from speciarl_jax.clock import Goodput, format_seconds
from speciarl_jax.config import Config
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.files import read_json
from speciarl_jax.gather import RolloutBatch
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.live import LiveView
from speciarl_jax.metrics import MetricsWriter, rollout_table, step_line
from speciarl_jax.predictions import from_rollout, read_predictions, write_predictions
from speciarl_jax.report.compare import compare
from speciarl_jax.report.plots import plot_training
from speciarl_jax.report.tables import comparison_table, format_estimate, metrics_table
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.scores import Groups
from speciarl_jax.session import Session
from speciarl_jax.storage import RunDir
from speciarl_jax.types import Metrics
from speciarl_jax.watch import Heartbeat, Profile


@dataclasses.dataclass
class Run:
    """The open parts of a run.

    Attributes:
        writer: None in all processes but the first.
        run_dir: `workdir`, perhaps with an address that it is copied to.
    """

    config: Config
    run_dir: RunDir
    console: Console
    session: Session
    judge: JudgeThread
    eval_judge: JudgeThread
    optimizer: optax.GradientTransformation
    loader: PromptLoader
    checkpoints: Checkpoints
    writer: MetricsWriter | None
    view: LiveView
    heartbeat: Heartbeat
    profile: Profile
    goodput: Goodput

    @property
    def workdir(self) -> pathlib.Path:
        """The folder to work in."""
        return self.run_dir.local


def report_start(
    console: Console, session: Session, loader: PromptLoader, state: TrainState
) -> None:
    """What is about to run, and what data was left out."""
    config = session.config
    console.print(
        f"{config.name}: {session.arch.text.num_layers} layers, {len(loader.index.kept)} images, "
        f"{config.train.prompts_per_step} prompts x {config.rollout.group_size} rollouts a step, "
        f"from step {state.step} to {config.train.num_steps}",
        markup=False,
    )
    for skipped in loader.index.skipped[:20]:
        console.print(f"skipped {skipped.image_name}: {skipped.reason}", markup=False)
    if len(loader.index.skipped) > 20:
        console.print(f"... {len(loader.index.skipped)} images skipped in all")


def report_step(
    run: Run, row: dict[str, float], rollouts: RolloutBatch | None, seconds: list[float]
) -> None:
    """The line of a step, the live view; now and then a table and the rollouts as a file."""
    step, train = int(row["step"]), run.config.train
    groups: Groups = rollouts.groups if rollouts is not None else []
    recent = sorted(seconds[-20:])
    eta = recent[len(recent) // 2] * (train.num_steps - step)
    run.view.update(step, eta, groups)
    if rollouts is None:
        if step % 20 == 0 or step == 1:
            run.console.print(
                f"step {step}/{train.num_steps}  loss {row['policy/loss']:.4f}  "
                f"{row['time/step_s']:.2f}s  eta {format_seconds(eta)}"
            )
        return
    run.console.print(step_line(row, train.num_steps, eta), markup=False)
    if train.table_every and (step % train.table_every == 0 or step in (1, train.num_steps)):
        run.console.print(rollout_table(groups, step))
        batch = rollouts.batch
        images = dict(zip(batch.prompt_ids, batch.images, strict=True))
        if run.writer is None:
            return
        run.writer.write_rollouts(step, groups, images)
        rows = [
            from_rollout(r, save_thumbnail(run.workdir, r.prompt_id, images[r.prompt_id]), step)
            for group in groups
            for r in group
        ]
        folder = run.workdir / "rollouts"
        folder.mkdir(exist_ok=True)
        write_predictions(folder / f"step_{step:06d}.jsonl", rows)


def finish(run: Run, base: Metrics | None, trained: Metrics | None) -> None:
    """Plots and the closing table."""
    plots = plot_training(run.workdir / "metrics.jsonl", run.workdir / "plots")
    scored = trained or base
    if base and trained:
        run.console.print(change_table(run))
    elif scored:
        run.console.print(metrics_table(scored, "scores"))
    best_of = run.workdir / "eval" / "best_of" / "metrics.json"
    if best_of.is_file():
        metrics = read_json(best_of, "delete eval/best_of and --resume: it is scored again")
        report_best_of(run.console, metrics)
    run.console.print(f"{len(plots)} plots in {run.workdir / 'plots'}", markup=False)


def change_table(run: Run) -> Table:
    """Trained against base on the same images, differences with paired intervals."""
    settings = run.config.eval
    base, trained = (
        read_predictions(run.workdir / "eval" / name / "predictions.jsonl")
        for name in ("base", "trained")
    )
    found = compare(
        base,
        trained,
        in_domain=run.config.data.in_domain,
        format_failures=settings.format_failures,
        bootstrap_samples=settings.bootstrap_samples,
        seed=run.config.seed,
    )
    title = "before and after training"
    return comparison_table(found["a"], found["b"], title, differences=found["differences"])


def report_best_of(console: Console, metrics: Metrics) -> None:
    """Upper bound: the base's best answer of N per image."""
    for name, scores in metrics["best_of"]["datasets"].items():
        best = scores["best"]
        values = "  ".join(f"{m} {format_estimate(best[m])}" for m in MAIN_METRICS)
        console.print(f"base, best of {scores['n']} on {name}: {values}", markup=False)
