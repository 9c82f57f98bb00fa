"""``train.async_steps=1``: the next answers are sampled while this step is judged and learned.

    step t     reference forwards | sample t+1 with the policy before update t ............ |
                                  |   labels of t arrive -> rewards -> update t is started  | wait

One thread gives the device all its work, in one order: between two chunks of decoding it looks
whether the labels of step t are all there, and if so starts its updates; the device, or the free
part of it, works on both. Processes that sample together start when all of them have their labels.
Sampling goes on with the old adapter, so the updates get a copy of it to write over (donate). When
the labels arrive changes when work starts and no number in it.

Rollouts of step t+1 come from the policy before update t: one step old, never more
(``rollout/staleness``; 0 at step one). `learn` says how the loss corrects for it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
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
from speciarl_jax.algorithm.step import StepResult
from speciarl_jax.algorithm.step_metrics import Learned, learning_metrics, step_metrics
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.devices.processes import Poll
from speciarl_jax.errors import RunEnded
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.policy.flops import Counts
from speciarl_jax.rollout.groups import RolloutBatch, await_verdicts
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.timing import Clock


def run_overlapped_step(
    session: Session,
    judge: JudgeThread,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loader: PromptLoader,
    ahead: RolloutBatch | None,
    poll: Poll | None = None,
    *,
    is_last: bool,
) -> StepResult:
    """One step on rollouts sampled during the last one, and the sampling for the next.

    Args as in `algorithm.step.run_step`, and:
        ahead: the rollouts of this step; None at the first, which samples its own.
        is_last: no step follows, so nothing is sampled for it.

    Raises:
        JudgeError, TrainingStopped: see `algorithm.step.run_step`.
    """
    config, clock, step = session.config, Clock(), state.step + 1
    agree, poll = session.agree, poll or session.agree
    sampled = Counts()
    rollouts = ahead
    if rollouts is None:
        rollouts = gather_rollouts(session, judge, state, loader, step, clock, poll)
        sampled += rollouts.sampled
    sequences = pad_alike(session, rollouts)
    references = start_references(session, state, sequences)
    # Sampling goes on reading the old adapter, so the update writes over a copy of it.
    writable = dataclasses.replace(state, trainable=jax.tree.map(jnp.copy, state.trainable))
    learned: list[Learned] = []

    def learn_if_judged(*numbers: int, error: RunEnded | None = None) -> tuple[int, ...]:
        if learned:  # a stop is no longer looked for: this step will be finished
            return agree(*numbers, error=error)
        *found, is_awaited = poll(*numbers, int(not rollouts.is_judged), error=error)
        if not is_awaited:
            await_verdicts(rollouts.pending, agree)
            lengths, index = sequences.completions.lengths, rollouts.batch.global_index
            credit = give_credit(config, rollouts.groups, lengths, index, step)
            update = start_update(session, optimizer, writable, sequences, credit, references)
            learned.append(Learned(rollouts, sequences, credit, references, update))
        return tuple(found)

    # The next step's answers are sampled here; each poll may start this step's update.
    following = None
    if not is_last:
        following = gather_rollouts(session, judge, state, loader, step + 1, clock, learn_if_judged)
        sampled += following.sampled
    # Labels slower than the sampling are waited for; then the update, if it has not been started.
    await_verdicts(rollouts.pending, agree if learned else poll)
    clock.lap("judge")
    learn_if_judged()
    (done,) = learned
    state, metrics = finish_update(config, state, done.update)
    clock.lap("update")

    metrics |= learning_metrics(config, done)
    check_agreement(config, metrics, step)
    metrics |= step_metrics(session, judge.stats(), done, clock.metrics(), sampled)
    return StepResult(state, rollouts, {"step": step, **metrics}, following)
