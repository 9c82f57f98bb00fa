"""ENTRY: `main(config, workdir)`: score the start, train, save, score the end.

This file decides the order of a run; `speciarl_jax.algorithm.step.run_step` that of a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator

import jax
import optax
from rich.console import Console

from speciarl_jax.algorithm.overlap import run_overlapped_step
from speciarl_jax.algorithm.pending import restore_rollouts, save_rollouts
from speciarl_jax.algorithm.sft import run_sft_step
from speciarl_jax.algorithm.step import StepResult, run_step
from speciarl_jax.config.schema import Config
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.targets import resolve_target
from speciarl_jax.devices import processes
from speciarl_jax.devices.processes import Poll
from speciarl_jax.errors import JudgeError, RunEnded, Stopped, TrainingStopped
from speciarl_jax.evaluate import Exam, eval_row, evaluate, is_validated
from speciarl_jax.judge.runner import JudgeThread, open_judge
from speciarl_jax.learner.optimizer import make_optimizer
from speciarl_jax.monitor.console import (
    is_table_due,
    keep_rollouts,
    report_end,
    report_save,
    report_start,
    report_step,
)
from speciarl_jax.monitor.live import LiveView
from speciarl_jax.monitor.tables import make_console
from speciarl_jax.monitor.watch import Heartbeat, Profile
from speciarl_jax.monitor.writer import MetricsWriter, open_wandb
from speciarl_jax.rollout.groups import RolloutBatch
from speciarl_jax.run import leaving, out_of_memory
from speciarl_jax.run.checkpoint import Checkpoints
from speciarl_jax.run.opening import (
    check_processes,
    check_scope,
    initial_like,
    open_checkpoints,
    open_train_loader,
    warm_up_rollouts,
)
from speciarl_jax.run.preemption import StepAbandoned, StopFlag, stop_signal, told_stop
from speciarl_jax.run.session import Session, enable_compile_cache, initial_state, open_session
from speciarl_jax.run.state import TrainState
from speciarl_jax.run.storage import RunDir, open_run_dir
from speciarl_jax.run.workdir import Resume, claimed_workdir
from speciarl_jax.scoring.results import Evaluation
from speciarl_jax.timing import Goodput

_ETA_STEPS = 20


@dataclasses.dataclass
class Run:
    """The open parts of a run; `writer` is None in all processes but the first."""

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
    stop: StopFlag

    @property
    def workdir(self) -> pathlib.Path:
        """The folder to work in."""
        return self.run_dir.local

    def stop_after(self, step: int) -> Stopped:
        """What ends the run when a stop was asked for and `step` is saved."""
        where = self.checkpoints.directory.parent
        return self.stop.error(f" after step {step}, saved in {where}", is_resumed=True)


def main(
    config: Config,
    workdir: pathlib.Path | str,
    *,
    resume: Resume = False,
    overwrite: bool = False,
    new_judge: bool = False,
    recipe_dir: pathlib.Path | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains a recipe in a work directory.

    Args:
        config: the recipe.
        workdir: folder or address; gets metrics.jsonl, config.json, checkpoints/, rollouts/,
            eval/, plots/.
        resume: go on from the newest checkpoint there; "auto": if a run is there, else start.
        overwrite: delete what an earlier run left there.
        new_judge: a resumed run may have another judge than before.
        recipe_dir: folder of the recipe file, for its prompts.
        profile: (first, last) step to trace, or None.

    Returns:
        The final state.

    Raises:
        ValueError: bad recipe, work directory in use, nothing to resume, missing model or data.
        JudgeError: the judge cannot be reached or gave up.
        TrainingStopped: see `algorithm.step.run_step`; or a device is out of memory.
        Stopped: by SIGTERM or Ctrl-C; saved.
    """
    config.validate()
    enable_compile_cache(config.compile_cache_dir)
    check_processes(config)
    run_dir = open_run_dir(workdir, jax.process_index())
    with (
        stop_signal() as stop,
        claimed_workdir(run_dir, config, resume, overwrite, new_judge) as is_resumed,
        told_stop(run_dir, stop),
        out_of_memory.told_memory(config),
        contextlib.ExitStack() as stack,
    ):
        with stop.at_once():
            session = open_session(config, recipe_dir)
            check_scope(session)
            run, state = stack.enter_context(
                open_run(session, run_dir, profile, stop, resume=is_resumed)
            )
        initial, exam = initial_like(state, session), Exam.test(config)
        if config.eval.score_base:
            score(run, initial, "base", exam)
        if config.eval.best_of:
            score(run, initial, "best_of", Exam.test(config, config.eval.best_of))
        state = train_loop(run, state)
        if config.eval.score_trained:
            score(run, state, "trained", exam)
        if processes.is_first():
            report_end(run.console, run.workdir, config)
        run_dir.push()
    return state


@contextlib.contextmanager
def open_run(
    session: Session,
    run_dir: RunDir,
    profile: tuple[int, int] | None,
    stop: StopFlag,
    *,
    resume: bool,
) -> Iterator[tuple[Run, TrainState]]:
    """Opens what a run needs and restores where it stood; closes it all in the end.

    With `resume` that is the newest checkpoint in `run_dir`, which is claimed for this run.

    Raises:
        ValueError: no usable checkpoint or data.
        JudgeError: the judge cannot be reached.
    """
    config, workdir = session.config, run_dir.local
    console = make_console() if processes.is_first() else Console(quiet=True)
    optimizer = make_optimizer(config.optim, config.num_updates)
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(contextlib.closing(open_train_loader(session)))
        checkpoints = stack.enter_context(contextlib.closing(open_checkpoints(config, run_dir)))
        # The state: that of a fresh run, or what the newest checkpoint holds.
        state = initial_state(session, optimizer, loader.get_state())
        if resume and checkpoints.steps():
            state, skipped = checkpoints.restore(state)
            for line in skipped:
                console.print(f"warning: {line}; using step {state.step}", markup=False)
            loader.set_state(state.data)
        report_start(console, session, loader, state)
        if config.rollout.warm_up:
            warm_up_rollouts(console, session, state)
        # The judge, or one for training and another for scores.
        sampled = state.step + (state.rollouts is not None)  # labels of these steps are known
        place = (jax.process_index(), jax.process_count())
        judge = stack.enter_context(open_judge(config.judge, workdir, sampled, *place))
        eval_judge = judge
        if not config.eval.use_train_judge:
            eval_judge = stack.enter_context(
                open_judge(config.eval.judge, workdir, sampled, *place)
            )
        # What only watches; metrics are written by the first process alone.
        writer = None
        if processes.is_first():
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
            stop,
        )
        yield run, state


def train_loop(run: Run, state: TrainState) -> TrainState:
    """Steps until ``train.num_steps``, saving, logging and validating on the way."""
    train, stop = run.config.train, run.stop
    step_seconds: list[float] = []
    ahead = None
    if state.rollouts is not None:
        ahead = restore_rollouts(run.session, state, run.loader, state.rollouts)
        state = dataclasses.replace(state, rollouts=None)
    validate_what_is_owed(run, state, ahead)
    while state.step < train.num_steps:
        run.profile.before(state.step + 1)
        waited = run.loader.wait_s
        with saved_if_left(run, state, ahead):
            result = take_step(run, state, ahead, make_poll(run, state.step + 1))
        waited = run.loader.wait_s - waited
        # The state is that of the next step from here on; what follows looks back on this one.
        state, ahead, row = result.state, result.ahead, result.metrics
        row |= {"time/data_s": waited, "time/data_frac": waited / (waited + row["time/step_s"])}
        state.data = run.loader.get_state()
        step_seconds.append(row["time/step_s"])
        is_last = state.step == train.num_steps
        if is_validated(run.config, state.step):
            with saved_if_left(run, state, ahead, row):
                row |= validation_metrics(run, state)
        row |= run.goodput.metrics(row)
        if run.writer is not None:
            run.writer.write(row)
        show_step(run, row, result.rollouts, step_seconds)
        traced = run.profile.after(state.step)
        if traced:
            run.console.print(f"trace of the steps in {traced}", markup=False)
        # Saved when it is time to, and before all processes leave together.
        is_stopped = processes.any_process(stop.is_set)
        if is_last or is_stopped or state.step % train.save_every == 0:
            save(run, state, ahead, row.get("eval/all/hm"))
        if is_stopped and not is_last:
            run.checkpoints.wait()
            raise run.stop_after(state.step)
    run.checkpoints.wait()
    return state


def validate_what_is_owed(run: Run, state: TrainState, ahead: RolloutBatch | None) -> None:
    """The validation before step one, or that of the last step if a stop cut it short."""
    if not run.config.train.eval_every:
        return
    if state.step == 0:
        row = validation_metrics(run, state)
        if run.writer is not None:
            run.writer.write({"step": 0} | row)
        return
    last = run.writer.last_row if run.writer is not None else {}
    is_new = last.get("step") == state.step and not any(name.startswith("eval/") for name in last)
    if processes.from_first(is_new and is_validated(run.config, state.step)):
        row = validation_metrics(run, state)
        if run.writer is not None:
            run.writer.amend(row)
        if run.config.train.keep_best:
            save(run, state, ahead, row.get("eval/all/hm"))


@contextlib.contextmanager
def saved_if_left(
    run: Run, state: TrainState, ahead: RolloutBatch | None, row: dict[str, float] | None = None
) -> Iterator[None]:
    """Saves a state that an error or a stop would else lose.

    Args:
        run: its open parts.
        state: what is saved, unless the step that failed has written over it already.
        ahead: rollouts of the next step; without labels their prompts are sampled again.
        row: of the step that led to `state`, if that is not written yet.

    Raises:
        Stopped: a stop was asked for.
        JudgeError, TrainingStopped: as they came.
        TrainingStopped: a device is out of memory; the line says what makes it smaller.
    """
    try:
        yield
    except StepAbandoned:  # several processes leave together
        _save_before_leaving(run, state, ahead, row, is_shared=True)
        raise run.stop_after(state.step) from None
    except RunEnded as error:
        _save_before_leaving(run, state, ahead, row, is_shared=error.is_shared)
        raise
    except out_of_memory.KINDS as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        saved = _save_before_leaving(run, state, ahead, row, is_shared=False)
        line = out_of_memory.explain(error, run.config)
        raise TrainingStopped(f"step {state.step + 1}: {line}; {saved}: --resume then") from error


def _save_before_leaving(
    run: Run,
    state: TrainState,
    ahead: RolloutBatch | None,
    row: dict[str, float] | None,
    *,
    is_shared: bool,
) -> str:
    """Saves, if there is a state and every process leaves here; says which step stands."""
    is_alone = jax.process_count() == 1  # several save together or not at all
    can_save = (is_alone or is_shared) and not state.is_donated
    if not can_save or processes.any_process(run.run_dir.is_lost):
        return f"the newest checkpoint is of step {max(run.checkpoints.steps(), default=0)}"
    if row is not None and run.writer is not None:
        run.writer.write(row)
    with contextlib.suppress(JudgeError):  # of the labels under way; saved without them then
        save(run, state, ahead)
    run.checkpoints.wait()
    return f"saved after step {state.step}"


def show_step(
    run: Run, row: dict[str, float], rollouts: RolloutBatch | None, seconds: list[float]
) -> None:
    """A finished step on the screen and in the run's folder; supervised ones have no rollouts.

    The median of the last `seconds` of the steps so far gives the remaining time.
    """
    step, train = int(row["step"]), run.config.train
    eta_s = statistics.median_high(seconds[-_ETA_STEPS:]) * (train.num_steps - step)
    run.view.update(step, eta_s, rollouts.groups if rollouts is not None else [])
    report_step(run.console, train, row, eta_s, rollouts)
    if rollouts is not None and run.writer is not None and is_table_due(train, step):
        keep_rollouts(run.writer, run.workdir, rollouts, step)


def make_poll(run: Run, step: int) -> Poll:
    """What is called between chunks of a step's work; see `run.leaving`."""
    return leaving.make_poll(run.session, run.run_dir, run.stop, lambda: run.heartbeat.beat(step))


def save(run: Run, state: TrainState, ahead: RolloutBatch | None, hm: float | None = None) -> None:
    """Starts saving the state with the rollouts of the next step; the first says what it costs.

    Raises:
        JudgeError: of their labels; saved is the state without them, before their prompts.
        TrainingStopped: another process has taken the run over; nothing is saved.
        OSError: the checkpoint cannot be written.
    """
    run.run_dir.check_held()
    start, is_first = time.perf_counter(), run.checkpoints.cost is None
    try:
        pending = save_rollouts(run.session, ahead) if ahead else None
    except JudgeError as error:
        if ahead is not None and (jax.process_count() == 1 or error.is_shared):
            run.checkpoints.save(dataclasses.replace(state, data=ahead.origin.data), hm)
            run.checkpoints.wait()
        raise
    run.checkpoints.save(dataclasses.replace(state, rollouts=pending), hm)
    if is_first and run.checkpoints.cost is not None:
        report_save(run.console, run.config.train, run.checkpoints.cost)
    share(run)
    run.goodput.add_checkpoint(time.perf_counter() - start)


def share(run: Run) -> None:
    """Copies what was written to object storage; if that fails, the next call tries again."""
    try:
        run.run_dir.push()
    except OSError as error:
        run.console.print(f"warning: not copied to object storage ({error})", markup=False)


def take_step(run: Run, state: TrainState, ahead: RolloutBatch | None, poll: Poll) -> StepResult:
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


def score(run: Run, state: TrainState, name: str, exam: Exam) -> dict[str, float]:
    """Evaluates a state into ``eval/<name>/``; finished work is not repeated.

    With ``eval.policy_samples`` the samples of the policy are scored too, into
    ``eval/<name>_sampled/``.

    Returns:
        ``eval/...`` and ``eval_sampled/...``: the three metrics, for the row of a step.
    """
    start = time.perf_counter()
    row = eval_row(_score(run, state, name, exam))
    if processes.any_process(run.stop.is_set):  # several processes leave together
        raise StepAbandoned
    if run.config.eval.policy_samples and name != "best_of":
        drawn = exam.drawn_as_in_training(run.config)
        row |= eval_row(_score(run, state, f"{name}_sampled", drawn), "eval_sampled")
    run.console.print(f"scored {name} in {time.perf_counter() - start:.1f}s")
    share(run)
    return row


def _score(run: Run, state: TrainState, name: str, exam: Exam) -> Evaluation:
    return evaluate(
        run.session,
        run.session.sampling_states(state.trainable),
        run.eval_judge,
        run.workdir / "eval" / name,
        exam,
        image_root=run.workdir,
        console=run.console,
        prompt_step=state.step,
        poll=make_poll(run, state.step),
    )


def validation_metrics(run: Run, state: TrainState) -> dict[str, float]:
    """The three metrics on the validation pictures, for the step's row."""
    return score(run, state, f"validation_{state.step:06d}", Exam.validation(run.config))
