"""ENTRY: `main(config, workdir)`: score the start, train, save, score the end.

This file decides the order of a run; `speciarl_jax.step.run_step` that of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

from speciarl_jax.checkpoint import Checkpoints, TrainState
from speciarl_jax.config import Config
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.recipe import make_loader, open_train_source
from speciarl_jax.evaluate import evaluate
from speciarl_jax.gather import RolloutBatch, generation_prompts, training_sampling
from speciarl_jax.judge.config import JudgeConfig
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.judge.verdict_log import VerdictLog
from speciarl_jax.live import LiveView, format_seconds
from speciarl_jax.metrics import (
    MetricsWriter,
    make_console,
    open_wandb,
    rollout_table,
    step_line,
)
from speciarl_jax.optim import init_optimizer, make_optimizer
from speciarl_jax.overlap import restore_rollouts, run_overlapped_step, save_rollouts
from speciarl_jax.predictions import from_rollout, read_predictions, write_predictions
from speciarl_jax.preemption import Preempted, stop_signal
from speciarl_jax.report.compare import compare
from speciarl_jax.report.plots import plot_training
from speciarl_jax.report.tables import comparison_table, format_estimate, metrics_table
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.rollout.warm_up import BatchShapes, warm_up
from speciarl_jax.scores import Groups, TrainingStopped
from speciarl_jax.session import Session, enable_compile_cache, open_session
from speciarl_jax.sft import resolve_target, run_sft_step
from speciarl_jax.step import StepResult, run_step
from speciarl_jax.workdir import prepare_workdir

_JUDGE_STARTUP_S = 60.0


def main(
    config: Config,
    workdir: pathlib.Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    recipe_dir: pathlib.Path | None = None,
) -> TrainState:
    """Trains a recipe in a work directory.

    Args:
        config: the recipe.
        workdir: gets metrics.jsonl, config.json, checkpoints/, rollouts/, eval/, plots/.
        resume: go on from the newest checkpoint there.
        overwrite: delete what an earlier run left there.
        recipe_dir: folder of the recipe file, for its prompts.

    Returns:
        The final state.

    Raises:
        ValueError: bad recipe, work directory in use, nothing to resume, missing model or data.
        JudgeError: the judge cannot be reached or gave up.
        TrainingStopped: see `step.run_step`.
        Preempted: SIGTERM; saved.
    """
    config.validate()
    enable_compile_cache(config.compile_cache_dir)
    console = make_console()
    prepare_workdir(workdir, config, resume=resume, overwrite=overwrite)
    session = open_session(config, recipe_dir)
    loader = open_train_loader(session)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    optimizer = make_optimizer(config.optim, num_updates(config))
    state = initial_state(session, optimizer, loader)
    if resume and checkpoints.steps():
        state, skipped = checkpoints.restore(state)
        for line in skipped:
            console.print(f"warning: {line}; using step {state.step}", markup=False)
        loader.set_state(state.data)
    report_start(console, session, loader, state)
    if config.rollout.warm_up:
        warm_up_rollouts(console, session, state)
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        stack.callback(checkpoints.close)
        sampled = state.step + (state.rollouts is not None)  # labels of these steps are known
        judge = stack.enter_context(open_judge(config.judge, workdir, sampled))
        writer = MetricsWriter(workdir, state.step or -1, open_wandb(config, workdir))
        stack.callback(writer.close)
        view = stack.enter_context(LiveView(console, config.train.num_steps, state.step))
        eval_judge = judge
        if not config.eval.use_train_judge:
            eval_judge = stack.enter_context(open_judge(config.eval.judge, workdir, state.step))
        run = Run(
            config,
            workdir,
            console,
            session,
            judge,
            eval_judge,
            optimizer,
            loader,
            checkpoints,
            writer,
            view,
        )
        base = score(run, state, "base") if config.eval.score_base else None
        if base and config.train.eval_every and state.step == 0:
            writer.write({"step": 0} | eval_row(base))
        if config.eval.best_of:
            score(run, initial_like(state, session), "best_of", samples=config.eval.best_of)
        state = train_loop(run, state)
        trained = score(run, state, "trained") if config.eval.score_trained else None
        finish(run, base, trained)
    return state


@dataclasses.dataclass
class Run:
    """The open parts of a run."""

    config: Config
    workdir: pathlib.Path
    console: Console
    session: Session
    judge: JudgeThread
    eval_judge: JudgeThread
    optimizer: optax.GradientTransformation
    loader: PromptLoader
    checkpoints: Checkpoints
    writer: MetricsWriter
    view: LiveView


def train_loop(run: Run, state: TrainState) -> TrainState:
    """Steps until ``train.num_steps``, saving, logging and validating on the way."""
    train = run.config.train
    step_seconds: list[float] = []
    ahead = None
    if state.rollouts is not None:
        ahead = restore_rollouts(run.session, state, run.loader, state.rollouts)
        state = dataclasses.replace(state, rollouts=None)
    with stop_signal() as stop:
        while state.step < train.num_steps:
            waited = run.loader.wait_s
            result = take_step(run, state, ahead)
            waited = run.loader.wait_s - waited
            state, ahead, row = result.state, result.ahead, result.metrics
            row |= {"time/data_s": waited, "time/data_frac": waited / (waited + row["time/step_s"])}
            state.data = run.loader.get_state()
            step_seconds.append(row["time/step_s"])
            is_last = state.step == train.num_steps
            if train.eval_every and (is_last or state.step % train.eval_every == 0):
                row |= validation_metrics(run, state, is_last=is_last)
            run.writer.write(row)
            report_step(run, row, result.rollouts, step_seconds)
            if is_last or stop.is_set or state.step % train.save_every == 0:
                saved = save_rollouts(run.session, ahead) if ahead else None
                run.checkpoints.save(dataclasses.replace(state, rollouts=saved))
            if stop.is_set and not is_last:
                raise Preempted(
                    f"stopped by signal after step {state.step}, saved in {run.workdir}; "
                    "start again with --resume"
                )
    return state


def take_step(run: Run, state: TrainState, ahead: RolloutBatch | None) -> StepResult:
    """A supervised or a reinforcement step, the latter perhaps overlapping the next."""
    train = run.config.train
    if run.config.algo.name == "sft":
        target = resolve_target(train.sft_target, run.config.data.source)
        batch = next(run.loader)
        state, row = run_sft_step(run.session, run.optimizer, state, run.loader, batch, target)
        return StepResult(state, None, row)
    parts = (run.session, run.judge, run.optimizer, state, run.loader)
    if not train.async_steps:
        return run_step(*parts)
    is_last = state.step + 1 == train.num_steps
    return run_overlapped_step(*parts, ahead, is_last=is_last)


def open_train_loader(session: Session) -> PromptLoader:
    """Training prompts in the run's global order."""
    config = session.config
    source = open_train_source(config.data)
    loader = make_loader(
        config.data,
        source,
        session.builder,
        generation_prompts(config),
        seed=config.seed,
        pad_id=int(session.vocabulary.stop_ids[0]),
    )
    if loader.plan.batches_per_epoch < 1:
        raise ValueError(
            f"data.source={config.data.source!r} has {len(loader.index.kept)} usable images, "
            f"a batch of {generation_prompts(config)} (train.prompts_per_step, or "
            "algo.generation_prompts) needs at least as many"
        )
    return loader


def num_updates(config: Config) -> int:
    """Optimiser updates of the whole run."""
    train = config.train
    return train.num_steps * (train.prompts_per_step // train.prompts_per_update)


def initial_state(
    session: Session, optimizer: optax.GradientTransformation, loader: PromptLoader
) -> TrainState:
    """Step 0."""
    trainable = session.parts.trainable
    return TrainState(trainable, init_optimizer(optimizer, trainable), 0, loader.get_state())


def initial_like(state: TrainState, session: Session) -> TrainState:
    """The untrained policy, whatever step `state` is at."""
    return dataclasses.replace(state, trainable=session.parts.trainable, step=0)


def open_judge(judge: JudgeConfig, workdir: pathlib.Path, step: int) -> JudgeThread:
    """Starts the judge with its cache and verdict log in the work directory.

    Raises:
        JudgeError: nobody answers; one line with the place.
    """
    defaults = {"cache_path": "judge_cache.sqlite", "log_path": "verdicts.sqlite"}
    settings = {k: str(workdir / v) for k, v in defaults.items() if not getattr(judge, k)}
    judge = dataclasses.replace(judge, **settings)
    if pathlib.Path(judge.log_path).is_file():
        log = VerdictLog(judge.log_path)
        log.cut_back(step)
        log.close()
    thread = JudgeThread(judge)
    try:
        thread.check_health(_JUDGE_STARTUP_S)
    except BaseException:
        thread.close()
        raise
    return thread


def score(run: Run, state: TrainState, name: str, samples: int = 0) -> dict[str, Any]:
    """Evaluates a state into ``eval/<name>/``; finished work is not repeated."""
    settings = run.config.eval
    sampling = Sampling(settings.temperature, settings.top_p)
    if samples:
        sampling = Sampling(settings.best_of_temperature, settings.best_of_top_p)
    if name == "base":
        state = initial_like(state, run.session)
    start = time.perf_counter()
    metrics = evaluate(
        run.session,
        (state.trainable, run.session.parts.frozen),
        run.eval_judge,
        run.workdir / "eval" / name,
        samples=samples or settings.samples,
        sampling=sampling,
        image_root=run.workdir,
        console=run.console,
        prompt_step=state.step,
    )
    seconds = time.perf_counter() - start
    run.console.print(f"scored {name} in {seconds:.1f}s")
    return metrics


def validation_metrics(run: Run, state: TrainState, *, is_last: bool) -> dict[str, float]:
    """The three metrics for the step's row; the last validation is the final score itself."""
    is_final = is_last and run.config.eval.score_trained
    return eval_row(score(run, state, "trained" if is_final else f"step_{state.step:06d}"))


def eval_row(metrics: dict[str, Any]) -> dict[str, float]:
    """``eval/<data set or average>/<metric>`` of a ``metrics.json``."""
    row = {}
    for group, values in {**metrics["datasets"], **metrics["averages"]}.items():
        for metric in ("correctness", "specificity", "hm"):
            value = values[metric]["value"]
            if value is not None:
                row[f"eval/{group}/{metric}"] = value
    return row


def warm_up_rollouts(console: Console, session: Session, state: TrainState) -> None:
    """Compiles every program that sampling can need; a step then waits for none."""
    config, start = session.config, time.perf_counter()
    shapes = BatchShapes(
        num_prompts=generation_prompts(config) // jax.process_count(),
        group_size=config.rollout.group_size,
        prompt_lengths=config.data.prompt_buckets,
        num_windows=config.data.window_buckets,
    )
    count = warm_up(
        session.engine,
        session.local_states(state.trainable),
        session.encode,
        session.arch.vision,
        shapes,
        sampling=training_sampling(config),
        seed=config.seed,
    )
    console.print(f"warm-up: {count} programs in {time.perf_counter() - start:.1f}s")


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
        run.writer.write_rollouts(step, groups, images)
        rows = [
            from_rollout(r, save_thumbnail(run.workdir, r.prompt_id, images[r.prompt_id]), step)
            for group in groups
            for r in group
        ]
        folder = run.workdir / "rollouts"
        folder.mkdir(exist_ok=True)
        write_predictions(folder / f"step_{step:06d}.jsonl", rows)


def finish(run: Run, base: dict[str, Any] | None, trained: dict[str, Any] | None) -> None:
    """Plots and the closing table."""
    plots = plot_training(run.workdir / "metrics.jsonl", run.workdir / "plots")
    if base and trained:
        run.console.print(change_table(run))
    elif trained or base:
        run.console.print(metrics_table(trained or base, "scores"))
    best_of = run.workdir / "eval" / "best_of" / "metrics.json"
    if best_of.is_file():
        metrics = json.loads(best_of.read_text())
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


def report_best_of(console: Console, metrics: dict[str, Any]) -> None:
    """Upper bound: the base's best answer of N per image."""
    for name, scores in metrics["best_of"]["datasets"].items():
        names = ("correctness", "specificity", "hm")
        values = "  ".join(f"{m} {format_estimate(scores['best'][m])}" for m in names)
        console.print(f"base, best of {scores['n']} on {name}: {values}", markup=False)


__all__ = ["Preempted", "TrainingStopped", "main"]
