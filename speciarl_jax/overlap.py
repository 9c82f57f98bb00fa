"""``train.async_steps=1``: the next answers are sampled while this step is judged and learned.

    step t     reference forwards | sample t+1 with the policy before update t ............ |
                                  |   labels of t arrive -> rewards -> update t is started  | wait

One thread gives the device all its work, in one order: between two chunks of decoding it looks
whether the labels of step t are all there, and if so starts its updates; the device, or the free
part of it, works on both. Sampling goes on with the old adapter, so the updates get a copy of it to
write over (donate). When the labels arrive changes when work starts and no number in it.

Rollouts of step t+1 come from the policy before update t: one step old, never more
(``rollout/staleness``; 0 at step one). `speciarl_jax.learn` says how the loss corrects for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speciarl_jax import batching, hosts
from speciarl_jax.checkpoint import SavedRollouts, TrainState
from speciarl_jax.clock import Clock
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.flops import Counts
from speciarl_jax.gather import Origin, RolloutBatch, gather_rollouts, read_again
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.rollout.groups import Poll, await_verdicts, no_poll
from speciarl_jax.session import Session
from speciarl_jax.step import Lesson, StepResult, report_step
from speciarl_jax.types import Category, Failure, FailureKind, Rollout, Verdict


def run_overlapped_step(
    session: Session,
    judge: JudgeThread,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loader: PromptLoader,
    ahead: RolloutBatch | None,
    poll: Poll = no_poll,
    *,
    is_last: bool,
) -> StepResult:
    """One step on rollouts sampled during the last one, and the sampling for the next.

    Args:
        session: model and engine.
        judge: labels answers in the background.
        optimizer: of `state`.
        state: after the last step.
        loader: the next prompts.
        ahead: the rollouts of this step; None at the first, which samples its own.
        poll: called between chunks of work until this step's update starts; may raise.
        is_last: no step follows, so nothing is sampled for it.

    Raises:
        JudgeError, TrainingStopped: see `step.run_step`.
    """
    clock = Clock()
    sampled = Counts()
    rollouts = ahead
    if rollouts is None:
        rollouts = gather_rollouts(session, judge, state, loader, state.step + 1, clock, poll)
        sampled += rollouts.sampled
    lesson = Lesson.begin(session, state, rollouts)
    writable = dataclasses.replace(state, trainable=jax.tree.map(jnp.copy, state.trainable))

    def learn_if_judged() -> None:
        if lesson.update is not None:
            return
        poll()
        if rollouts.is_judged:
            await_verdicts(rollouts.pending)
            lesson.learn(session, optimizer, writable)

    following = None
    if not is_last:
        step = state.step + 2
        following = gather_rollouts(session, judge, state, loader, step, clock, learn_if_judged)
        sampled += following.sampled
    await_verdicts(rollouts.pending, poll if lesson.update is None else no_poll)
    clock.lap("judge")
    learn_if_judged()
    state, metrics = lesson.finish(session, state)
    clock.lap("update")
    metrics |= report_step(session, judge, lesson, clock, sampled)
    return StepResult(state, rollouts, {"step": state.step, **metrics}, following)


def save_rollouts(session: Session, rollouts: RolloutBatch) -> SavedRollouts:
    """Rollouts of the next step as arrays and JSON, after waiting for the labels still under way.

    Those of all processes, so that another number of processes can go on. Prompts and images are
    not among them: they are read again from the same place in the data.

    Raises:
        JudgeError: the judge gave up.
    """
    await_verdicts(rollouts.pending)
    limit = session.config.rollout.max_completion_tokens
    longest = max(len(r.completion_tokens) for group in rollouts.groups for r in group)
    arrays = batching.group_arrays(rollouts.groups, limit, *hosts.largest(longest))
    origin = rollouts.origin
    groups = [[_to_json(rollout) for rollout in group] for group in rollouts.groups]
    return SavedRollouts(
        arrays={
            "tokens": hosts.gather_prompts(arrays.tokens),
            "lengths": hosts.gather_prompts(arrays.lengths),
            "rollout_logprobs": hosts.gather_prompts(arrays.rollout_logprobs),
        },
        record={
            "step": rollouts.step,
            "sampled_after": rollouts.sampled_after,
            "stats": hosts.mean(rollouts.stats),
            "origin": {
                "data": origin.data,
                "num_batches": origin.num_batches,
                "rows": None if origin.rows is None else origin.rows.tolist(),
            },
            "global_index": hosts.gather_prompts(rollouts.batch.global_index).tolist(),
            "groups": [group for part in hosts.gather_json(groups) for group in part],
        },
    )


def restore_rollouts(
    session: Session, state: TrainState, loader: PromptLoader, saved: SavedRollouts
) -> RolloutBatch:
    """What `save_rollouts` was given, bit for bit; the loader then stands behind its prompts.

    Raises:
        ValueError: the prompts read again are not those of the rollouts.
    """
    record, rows = saved.record, saved.record["origin"]["rows"]
    if rows is not None and jax.process_count() > 1:
        raise ValueError(
            f"checkpoint of step {state.step}: its pending rollouts come from dynamic sampling in "
            "one process; resume with one process"
        )
    origin = Origin(
        record["origin"]["data"],
        record["origin"]["num_batches"],
        None if rows is None else np.asarray(rows, np.int64),
    )
    batch, image_embeds = read_again(session, state, loader, origin)
    place = {index: p for p, index in enumerate(record["global_index"])}
    where = [place.get(int(index), -1) for index in batch.global_index]
    groups = [
        [_from_json(fields, saved.arrays, p, g) for g, fields in enumerate(record["groups"][p])]
        for p in where
        if p >= 0
    ]
    found = [group[0].prompt_id for group in groups]
    if found != batch.prompt_ids:
        raise ValueError(
            f"checkpoint of step {state.step}: its pending rollouts answer {found[:3]}..., the "
            f"data now give {batch.prompt_ids[:3]}...; resume with the same data"
        )
    return RolloutBatch(
        step=record["step"],
        sampled_after=record["sampled_after"],
        batch=batch,
        image_embeds=image_embeds,
        groups=groups,
        pending=[],
        origin=origin,
        stats=record["stats"],
        sampled=Counts(),
    )


_ARRAY_FIELDS = ("completion_tokens", "rollout_logprobs")


def _to_json(rollout: Rollout) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Rollout) if f.name not in _ARRAY_FIELDS]
    fields = {name: getattr(rollout, name) for name in names}
    outcome = rollout.outcome
    if isinstance(outcome, Verdict):
        fields["outcome"] = {**dataclasses.asdict(outcome), "category": outcome.category.label}
    elif isinstance(outcome, Failure):
        fields["outcome"] = {"kind": outcome.kind.value, "message": outcome.message}
    return fields


def _from_json(fields: dict[str, Any], arrays: dict[str, np.ndarray], p: int, g: int) -> Rollout:
    length = int(arrays["lengths"][p, g])
    outcome = fields["outcome"]
    if outcome is not None and "kind" in outcome:
        outcome = Failure(FailureKind(outcome["kind"]), outcome["message"])
    elif outcome is not None:
        outcome = Verdict(**{**outcome, "category": Category.from_label(outcome["category"])})
    return Rollout(
        **{**fields, "outcome": outcome},
        completion_tokens=np.asarray(arrays["tokens"][p, g, :length]),
        rollout_logprobs=np.asarray(arrays["rollout_logprobs"][p, g, :length]),
    )
