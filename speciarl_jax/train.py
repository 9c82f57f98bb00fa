"""ENTRY: `main(config, workdir)`: score the start, train, save, score the end.

This file decides the order of a run; `speciarl_jax.step.run_step` that of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
from rich.console import Console

from speciarl_jax import hosts
from speciarl_jax.bootstrap import MAIN_METRICS
from speciarl_jax.checkpoint import Checkpoints, TrainState
from speciarl_jax.clock import Goodput
from speciarl_jax.config import Config
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.recipe import make_loader, open_train_source
from speciarl_jax.evaluate import evaluate
from speciarl_jax.gather import RolloutBatch, generation_prompts, training_sampling
from speciarl_jax.judge.base import JudgeError
from speciarl_jax.judge.config import JudgeConfig
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.judge.verdict_log import VerdictLog
from speciarl_jax.live import LiveView
from speciarl_jax.metrics import MetricsWriter, make_console, open_wandb
from speciarl_jax.optim import make_optimizer
from speciarl_jax.overlap import restore_rollouts, run_overlapped_step, save_rollouts
from speciarl_jax.preemption import Preempted, StepAbandoned, StopFlag, stop_signal
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.rollout.warm_up import BatchShapes, warm_up
from speciarl_jax.run_report import Run, finish, report_start, report_step
from speciarl_jax.scores import TrainingStopped
from speciarl_jax.session import Session, enable_compile_cache, initial_state, open_session
from speciarl_jax.sft import resolve_target, run_sft_step
from speciarl_jax.step import StepResult, run_step
from speciarl_jax.storage import RunDir, open_run_dir
from speciarl_jax.types import Metrics
from speciarl_jax.watch import Heartbeat, Profile
from speciarl_jax.workdir import prepare_workdir

_JUDGE_STARTUP_S = 60.0


def main(
    config: Config,
    workdir: pathlib.Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    recipe_dir: pathlib.Path | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains a recipe in a work directory.

    Args:
        config: the recipe.
        workdir: folder or address; gets metrics.jsonl, config.json, checkpoints/, rollouts/,
            eval/, plots/.
        resume: go on from the newest checkpoint there.
        overwrite: delete what an earlier run left there.
        recipe_dir: folder of the recipe file, for its prompts.
        profile: (first, last) step to trace, or None.

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
    check_processes(config)
    run_dir = open_run_dir(workdir, jax.process_index())
    claim_workdir(run_dir, config, resume=resume, overwrite=overwrite)
    session = open_session(config, recipe_dir)
    with open_run(session, run_dir, profile, resume=resume) as (run, state):
        base = score(run, state, "base") if config.eval.score_base else None
        if base and run.writer and config.train.eval_every and state.step == 0:
            run.writer.write({"step": 0} | eval_row(base))
        if config.eval.best_of:
            score(run, initial_like(state, session), "best_of", samples=config.eval.best_of)
        state = train_loop(run, state)
        trained = score(run, state, "trained") if config.eval.score_trained else None
        if hosts.is_first():
            finish(run, base, trained)
    run_dir.push()
    return state


@contextlib.contextmanager
def open_run(
    session: Session, run_dir: RunDir, profile: tuple[int, int] | None, *, resume: bool
) -> Iterator[tuple[Run, TrainState]]:
    """Opens what a run needs and restores where it stood; closes it all in the end.

    Args:
        session: model, tokenizer, prompts.
        run_dir: claimed for this run.
        profile: (first, last) step to trace, or None.
        resume: take the newest checkpoint there.

    Raises:
        ValueError: no usable checkpoint or data.
        JudgeError: the judge cannot be reached.
    """
    config, workdir = session.config, run_dir.local
    console = make_console() if hosts.is_first() else Console(quiet=True)
    optimizer = make_optimizer(config.optim, num_updates(config))
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(contextlib.closing(open_train_loader(session)))
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(config, run_dir)))
        state = initial_state(session, optimizer, loader.get_state())
        if resume and checkpoints.steps():
            state, skipped = checkpoints.restore(state)
            for line in skipped:
                console.print(f"warning: {line}; using step {state.step}", markup=False)
            loader.set_state(state.data)
        report_start(console, session, loader, state)
        if config.rollout.warm_up:
            warm_up_rollouts(console, session, state)
        sampled = state.step + (state.rollouts is not None)  # labels of these steps are known
        judge = stack.enter_context(open_judge(config.judge, workdir, sampled))
        eval_judge = judge
        if not config.eval.use_train_judge:
            eval_judge = stack.enter_context(open_judge(config.eval.judge, workdir, state.step))
        writer = None
        if hosts.is_first():
            writer = MetricsWriter(workdir, state.step or -1, open_wandb(config, workdir))
            stack.callback(writer.close)
        run = Run(
            config,
            run_dir,
            console,
            session,
            judge,
            eval_judge,
            optimizer,
            loader,
            checkpoints,
            writer,
            stack.enter_context(LiveView(console, config.train.num_steps, state.step)),
            Heartbeat(workdir, jax.process_index()),
            stack.enter_context(contextlib.closing(Profile(workdir, profile))),
            Goodput(),
        )
        yield run, state


def open_checkpoints(config: Config, run_dir: RunDir) -> Checkpoints:
    """The run's checkpoints, kept as the recipe says."""
    train = config.train
    return Checkpoints(run_dir.checkpoints, train.keep_checkpoints, keep_best=train.keep_best)


def check_processes(config: Config) -> None:
    """Refuses what one process can do and this number of them cannot.

    Raises:
        ValueError: names the setting.
    """
    count, algo = jax.process_count(), config.algo
    if count > 1 and algo.dynamic_sampling and config.train.async_steps:
        # Its agreement on each batch would meet the updates, which start when labels come.
        raise ValueError(
            f"algo.dynamic_sampling=true with train.async_steps={config.train.async_steps}: not "
            f"implemented for {count} processes; leave one of them at its default"
        )
    for name, prompts in {
        "train.prompts_per_update": config.train.prompts_per_update,
        "algo.generation_prompts": algo.generation_prompts,
    }.items():
        if prompts % count:
            raise ValueError(f"{name}={prompts}: expected a multiple of the {count} processes")


def claim_workdir(run_dir: RunDir, config: Config, *, resume: bool, overwrite: bool) -> None:
    """`prepare_workdir` by the first process; all of them end if it refuses.

    Raises:
        ValueError: see `workdir.prepare_workdir`.
    """
    problem = None
    if hosts.is_first():
        try:
            prepare_workdir(run_dir, config, resume=resume, overwrite=overwrite)
        except ValueError as error:
            problem = str(error)
    problem = hosts.from_first(problem)
    if problem is not None:
        raise ValueError(problem)
    if not hosts.is_first():
        run_dir.pull()


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
            run.profile.before(state.step + 1)
            waited = run.loader.wait_s
            try:
                result = take_step(run, state, ahead, make_poll(run, state.step + 1, stop))
            except StepAbandoned:
                save(run, state, ahead)
                run.checkpoints.wait()
                raise Preempted(_stopped(run, state)) from None
            except JudgeError:
                if jax.process_count() == 1:  # several save together or not at all
                    if ahead is not None:  # without labels: its prompts are sampled again
                        state = dataclasses.replace(state, data=ahead.origin.data)
                    save(run, state, None)
                    run.checkpoints.wait()
                raise
            waited = run.loader.wait_s - waited
            state, ahead, row = result.state, result.ahead, result.metrics
            row |= {"time/data_s": waited, "time/data_frac": waited / (waited + row["time/step_s"])}
            state.data = run.loader.get_state()
            step_seconds.append(row["time/step_s"])
            is_last = state.step == train.num_steps
            if train.eval_every and (is_last or state.step % train.eval_every == 0):
                row |= validation_metrics(run, state, is_last=is_last)
            row |= run.goodput.metrics(row)
            if run.writer is not None:
                run.writer.write(row)
            report_step(run, row, result.rollouts, step_seconds)
            traced = run.profile.after(state.step)
            if traced:
                run.console.print(f"trace of the steps in {traced}", markup=False)
            is_stopped = hosts.any_process(stop.is_set)
            if is_last or is_stopped or state.step % train.save_every == 0:
                save(run, state, ahead, row.get("eval/all/hm"))
            if is_stopped and not is_last:
                run.checkpoints.wait()
                raise Preempted(_stopped(run, state))
    run.checkpoints.wait()
    return state


def _stopped(run: Run, state: TrainState) -> str:
    return (
        f"stopped by signal after step {state.step}, saved in {run.checkpoints.directory.parent}; "
        "start again with --resume"
    )


def make_poll(run: Run, step: int, stop: StopFlag) -> Callable[[], None]:
    """What a step calls between chunks of its work: the heartbeat, and whether to leave it.

    With several processes none leaves alone: they agree after the step.
    """

    def poll() -> None:
        run.heartbeat.beat(step)
        if jax.process_count() == 1:
            stop.check()

    return poll


def save(run: Run, state: TrainState, ahead: RolloutBatch | None, hm: float | None = None) -> None:
    """Saves the state with the rollouts of the next step, if there are any.

    It is written in the background, unless the run stops.
    """
    start = time.perf_counter()
    pending = save_rollouts(run.session, ahead) if ahead else None
    run.checkpoints.save(dataclasses.replace(state, rollouts=pending), hm)
    share(run)
    run.goodput.add_checkpoint(time.perf_counter() - start)


def share(run: Run) -> None:
    """Copies what was written to object storage; if that fails, the next call tries again."""
    try:
        run.run_dir.push()
    except OSError as error:
        run.console.print(f"warning: not copied to object storage ({error})", markup=False)


def take_step(
    run: Run, state: TrainState, ahead: RolloutBatch | None, poll: Callable[[], None]
) -> StepResult:
    """A supervised or a reinforcement step, the latter perhaps overlapping the next."""
    train = run.config.train
    if run.config.algo.name == "sft":
        target = resolve_target(train.sft_target, run.config.data.source)
        poll()
        batch = next(run.loader)
        state, row = run_sft_step(run.session, run.optimizer, state, run.loader, batch, target)
        return StepResult(state, None, row)
    parts = (run.session, run.judge, run.optimizer, state, run.loader)
    if not train.async_steps:
        return run_step(*parts, poll)
    is_last = state.step + 1 == train.num_steps
    return run_overlapped_step(*parts, ahead, poll, is_last=is_last)


def open_train_loader(session: Session) -> PromptLoader:
    """Training prompts in the run's global order."""
    config = session.config
    source = open_train_source(config.data)
    is_whole = jax.process_count() == 1 or config.algo.dynamic_sampling
    num_blocks = 1 if is_whole else num_mini_batches(config)  # each process has its part of each
    loader = make_loader(
        config.data,
        source,
        session.builder,
        generation_prompts(config),
        seed=config.seed,
        pad_id=int(session.vocabulary.stop_ids[0]),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_blocks=num_blocks,
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
    return config.train.num_steps * num_mini_batches(config)


def num_mini_batches(config: Config) -> int:
    """Optimiser updates of a step."""
    return config.train.prompts_per_step // config.train.prompts_per_update


def initial_like(state: TrainState, session: Session) -> TrainState:
    """The untrained policy, whatever step `state` is at."""
    return dataclasses.replace(state, trainable=session.parts.trainable, step=0)


def open_judge(judge: JudgeConfig, workdir: pathlib.Path, step: int) -> JudgeThread:
    """Starts the judge with its cache and verdict log in the work directory.

    Raises:
        JudgeError: nobody answers; one line with the place.
    """
    number = jax.process_index()
    own = f".{number}" if number else ""  # each process has its own files
    judge = dataclasses.replace(
        judge,
        cache_path=judge.cache_path or str(workdir / f"judge_cache{own}.sqlite"),
        log_path=judge.log_path or str(workdir / f"verdicts{own}.sqlite"),
        num_hosts=max(judge.num_hosts, jax.process_count()),
    )
    if pathlib.Path(judge.log_path).is_file():
        log = VerdictLog(judge.log_path)
        log.cut_back(step)
        log.close()
    with contextlib.ExitStack() as undo:
        thread = undo.enter_context(JudgeThread(judge))
        thread.check_health(_JUDGE_STARTUP_S)
        undo.pop_all()
    return thread


def score(run: Run, state: TrainState, name: str, samples: int = 0) -> Metrics:
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
        run.session.local_states(state.trainable),
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
    share(run)
    return metrics


def validation_metrics(run: Run, state: TrainState, *, is_last: bool) -> dict[str, float]:
    """The three metrics for the step's row; the last validation is the final score itself."""
    is_final = is_last and run.config.eval.score_trained
    return eval_row(score(run, state, "trained" if is_final else f"step_{state.step:06d}"))


def eval_row(metrics: Metrics) -> dict[str, float]:
    """``eval/<data set or average>/<metric>`` of a ``metrics.json``."""
    row = {}
    for group, values in {**metrics["datasets"], **metrics["averages"]}.items():
        for metric in MAIN_METRICS:
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


__all__ = ["Preempted", "TrainingStopped", "main"]
