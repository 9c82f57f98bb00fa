"""Rollouts that wait for their step, in a checkpoint and out of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from speciarl_jax.algorithm.gather import read_again
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.devices import processes
from speciarl_jax.learner import batches
from speciarl_jax.policy.flops import Counts
from speciarl_jax.rollout.groups import (
    Origin,
    RolloutBatch,
    await_verdicts,
    outcome_from_json,
    outcome_to_json,
)
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import SavedRollouts, TrainState
from speciarl_jax.types import Rollout


def save_rollouts(session: Session, rollouts: RolloutBatch) -> SavedRollouts:
    """Rollouts of the next step as arrays and JSON, after waiting for the labels still under way.

    Those of all processes, so that another number of processes can go on. Prompts and images are
    not among them: they are read again from the same place in the data.

    Raises:
        JudgeError: the judge gave up.
    """
    await_verdicts(rollouts.pending, session.agree)
    limit = session.config.rollout.max_completion_tokens
    longest = max(len(r.completion_tokens) for group in rollouts.groups for r in group)
    arrays = batches.pad_completions(rollouts.groups, limit, *processes.largest(longest))
    origin = rollouts.origin
    groups = [[_to_json(rollout) for rollout in group] for group in rollouts.groups]
    everywhere = {
        "tokens": processes.gather_prompts(arrays.completion_tokens),
        "lengths": processes.gather_prompts(arrays.lengths),
        "rollout_logprobs": processes.gather_prompts(arrays.rollout_logprobs),
    }
    record = {
        "step": rollouts.step,
        "sampled_after": rollouts.sampled_after,
        "stats": processes.mean(rollouts.stats),
        "origin": {
            "data": origin.data,
            "num_batches": origin.num_batches,
            "rows": None if origin.rows is None else origin.rows.tolist(),
        },
        "global_index": processes.gather_prompts(rollouts.batch.global_index).tolist(),
        "groups": [group for part in processes.gather_json(groups) for group in part],
    }
    return SavedRollouts(everywhere, record)


def restore_rollouts(
    session: Session, state: TrainState, loader: PromptLoader, saved: SavedRollouts
) -> RolloutBatch:
    """What `save_rollouts` was given, bit for bit; the loader then stands behind its prompts.

    Raises:
        ValueError: the prompts read again are not those of the rollouts.
    """
    record, arrays = saved.record, saved.arrays
    rows = record["origin"]["rows"]
    if rows is not None and jax.process_count() > 1:
        raise ValueError(
            f"checkpoint of step {state.step}: its pending rollouts come from dynamic sampling in "
            "one process; resume with one process"
        )
    rows = None if rows is None else np.asarray(rows, np.int64)
    origin = Origin(**record["origin"] | {"rows": rows})
    batch, image_embeds = read_again(session, state, loader, origin)
    place = {index: p for p, index in enumerate(record["global_index"])}
    where = [place.get(int(index), -1) for index in batch.global_index]
    groups = [
        [_from_json(fields, arrays, p, g) for g, fields in enumerate(record["groups"][p])]
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


def _to_json(rollout: Rollout) -> dict[str, Any]:
    fields = dataclasses.asdict(rollout)
    del fields["completion_tokens"], fields["rollout_logprobs"]
    outcome = rollout.outcome
    return fields | {"outcome": None if outcome is None else outcome_to_json(outcome)}


def _from_json(fields: dict[str, Any], arrays: dict[str, np.ndarray], p: int, g: int) -> Rollout:
    length = int(arrays["lengths"][p, g])
    outcome = fields["outcome"]
    return Rollout(
        **{**fields, "outcome": None if outcome is None else outcome_from_json(outcome)},
        completion_tokens=np.asarray(arrays["tokens"][p, g, :length]),
        rollout_logprobs=np.asarray(arrays["rollout_logprobs"][p, g, :length]),
    )
