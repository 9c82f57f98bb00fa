"""What a run tells the person who started it: at the start, after each step, in the end."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import cast

from rich.console import Console

from speciarl_jax.config.schema import Config, TrainConfig
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.files import read_json
from speciarl_jax.monitor.tables import rollout_table, step_line
from speciarl_jax.monitor.writer import MetricsWriter
from speciarl_jax.report.compare import compare
from speciarl_jax.report.plots import plot_training
from speciarl_jax.report.tables import comparison_table, format_estimate, metrics_table
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.rollout.groups import RolloutBatch
from speciarl_jax.run.checkpoint import SaveCost
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.scoring.bootstrap import MAIN_METRICS, ScoringRule
from speciarl_jax.scoring.predictions import from_rollout, read_predictions, write_predictions
from speciarl_jax.scoring.results import Evaluation
from speciarl_jax.timing import format_seconds

_SFT_LINE_EVERY = 20  # supervised steps are short


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
    console: Console,
    train: TrainConfig,
    row: Mapping[str, float],
    eta_s: float,
    rollouts: RolloutBatch | None,
) -> None:
    """The line of a step; now and then a table of its answers, unless it was supervised."""
    step = int(row["step"])
    if rollouts is not None:
        console.print(step_line(row, train.num_steps, eta_s), markup=False)
        if is_table_due(train, step):
            console.print(rollout_table(rollouts.groups, step))
    elif step % _SFT_LINE_EVERY == 0 or step == 1:
        console.print(
            f"step {step}/{train.num_steps}  loss {row['policy/loss']:.4f}  "
            f"{row['time/step_s']:.2f}s  eta {format_seconds(eta_s)}"
        )


def report_save(console: Console, train: TrainConfig, cost: SaveCost) -> None:
    """What saving takes, once a run."""
    console.print(
        f"saves: {cost.num_bytes / 1e6:.1f} MB, every {train.save_every} steps; the first "
        f"held the run up {cost.total_s:.2f}s, {cost.hash_s:.2f}s of it for hashes",
        markup=False,
    )


def is_table_due(train: TrainConfig, step: int) -> bool:
    """Whether the answers of a step are shown and kept."""
    if not train.table_every:
        return False
    return step % train.table_every == 0 or step in (1, train.num_steps)


def keep_rollouts(
    writer: MetricsWriter, workdir: pathlib.Path, rollouts: RolloutBatch, step: int
) -> None:
    """Answers of a step to TensorBoard and W&B, and as ``rollouts/step_<number>.jsonl``."""
    groups, batch = rollouts.groups, rollouts.batch
    images = dict(zip(batch.prompt_ids, batch.images, strict=True))
    writer.write_rollouts(step, groups, images)
    rows = [
        from_rollout(r, save_thumbnail(workdir, r.prompt_id, images[r.prompt_id]), step)
        for group in groups
        for r in group
    ]
    folder = workdir / "rollouts"
    folder.mkdir(exist_ok=True)
    write_predictions(folder / f"step_{step:06d}.jsonl", rows)


def report_end(console: Console, workdir: pathlib.Path, config: Config) -> None:
    """Plots and the closing tables of what was scored: greedy answers, samples, best of N."""
    plots = plot_training(workdir / "metrics.jsonl", workdir / "plots")
    _report_scores(console, workdir, config, "", "before and after training")
    if config.eval.policy_samples:
        title = f"the same at temperature {config.rollout.temperature:g}"
        _report_scores(console, workdir, config, "_sampled", title)
    if config.eval.best_of:
        report_best_of(console, _read_metrics(workdir, "best_of"))
    console.print(f"{len(plots)} plots in {workdir / 'plots'}", markup=False)


def _report_scores(
    console: Console, workdir: pathlib.Path, config: Config, suffix: str, title: str
) -> None:
    """What changed where base and trained policy were scored; else the scores that there are."""
    is_scored = {"base": config.eval.score_base, "trained": config.eval.score_trained}
    names = [f"{name}{suffix}" for name, is_on in is_scored.items() if is_on]
    if len(names) == 2:
        base, trained = (
            read_predictions(workdir / "eval" / name / "predictions.jsonl") for name in names
        )
        rule = ScoringRule(config.eval.format_failures, config.eval.bootstrap_samples)
        found = compare(base, trained, config.data.in_domain, rule)
        console.print(comparison_table(found, title))
    elif names:
        console.print(metrics_table(_read_metrics(workdir, names[0]), f"scores: {names[0]}"))


def _read_metrics(workdir: pathlib.Path, name: str) -> Evaluation:
    file = workdir / "eval" / name / "metrics.json"
    return cast(Evaluation, read_json(file, f"delete eval/{name} and --resume: it is scored again"))


def report_best_of(console: Console, metrics: Evaluation) -> None:
    """Upper bound: the base's best answer of N per image."""
    for name, scores in metrics["best_of"]["datasets"].items():
        best = scores["best"]
        values = "  ".join(f"{m} {format_estimate(best[m])}" for m in MAIN_METRICS)
        console.print(f"base, best of {scores['n']} on {name}: {values}", markup=False)
