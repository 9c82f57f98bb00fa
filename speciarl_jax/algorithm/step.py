"""One step of the algorithm, top to bottom: `run_step`.

    sample groups (decode; finished answers go to the judge at once)
    -> log-probs that need no labels -> labels
    -> best-of-N reward -> group advantages -> token weights
    -> mini-batches -> one optimiser update each

`speciarl_jax.train` repeats it; `overlap` makes the same six calls one step ahead of their labels.
What differs from the paper: nothing in the mathematics; a label that is missing masks its rollout
(the released code scores it 0.0), and the loss is normalised over the whole mini-batch
(``algo.normalization="verl"`` gives the original).
"""

from __future__ import annotations

import dataclasses

import optax

from speciarl_jax.algorithm.credit import give_credit
from speciarl_jax.algorithm.gather import gather_rollouts
from speciarl_jax.algorithm.learn import (
    check_agreement,
    finish_update,
    pad_alike,
    start_references,
    start_update,
)
from speciarl_jax.algorithm.step_metrics import Learned, learning_metrics, step_metrics
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.devices.processes import Poll
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.rollout.groups import RolloutBatch, await_verdicts
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.timing import Clock
from speciarl_jax.types import Metrics


@dataclasses.dataclass
class StepResult:
    """What a step leaves.

    Attributes:
        state: after the step.
        rollouts: what it learned from, judged and scored; None after a supervised step.
        metrics: its row.
        ahead: answers sampled for the next step already (`train.async_steps`), or None.
    """

    state: TrainState
    rollouts: RolloutBatch | None
    metrics: Metrics
    ahead: RolloutBatch | None = None


def run_step(
    session: Session,
    judge: JudgeThread,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loader: PromptLoader,
    poll: Poll | None = None,
) -> StepResult:
    """One step: sample, judge, reward, update.

    Args:
        session: model and engine.
        judge: labels answers in the background.
        optimizer: of `state`.
        state: after the last step; its `trainable` and `optim` are donated.
        loader: the next prompts.
        poll: called between chunks of work until the update starts; may raise.

    Raises:
        JudgeError: the judge gave up; nothing was updated.
        TrainingStopped: too many labels missing, too few groups to learn from, sampler and trainer
            disagree, or too many non-finite gradients.
    """
    config, clock, step = session.config, Clock(), state.step + 1
    poll = poll or session.agree
    rollouts = gather_rollouts(session, judge, state, loader, step, clock, poll)
    # The judge is still at work on the last answers; these forward passes need no labels.
    sequences = pad_alike(session, rollouts)
    references = start_references(session, state, sequences)
    await_verdicts(rollouts.pending, poll)
    clock.lap("judge")
    # Labels -> bar -> rewards -> advantages, on the host.
    lengths, index = sequences.completions.lengths, rollouts.batch.global_index
    credit = give_credit(config, rollouts.groups, lengths, index, step)
    # One optimiser update per mini-batch; what is left is to wait for the device and to report.
    update = start_update(session, optimizer, state, sequences, credit, references)
    state, metrics = finish_update(config, state, update)
    clock.lap("update")

    learned = Learned(rollouts, sequences, credit, references, update)
    metrics |= learning_metrics(config, learned)
    check_agreement(config, metrics, step)
    metrics |= step_metrics(session, judge.stats(), learned, clock.metrics(), rollouts.sampled)
    return StepResult(state, rollouts, {"step": step, **metrics})
