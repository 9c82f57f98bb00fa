"""Gathers the answers that one step learns from: one generation batch, or as many as it takes.

prompts -> encode -> sample; finished answers go to the judge at once
algo.dynamic_sampling:  -> labels -> groups whose raw rewards differ are kept
                        -> again, until train.prompts_per_step are kept -> joined to one batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from speciarl_jax.algorithm.credit import check_failed_budget, has_lesson, label_codes
from speciarl_jax.config.schema import Config
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.devices import processes
from speciarl_jax.devices.layout import AnyArray, own_prompts
from speciarl_jax.devices.processes import Poll
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.learner import batches
from speciarl_jax.objective.reward import dropped_groups
from speciarl_jax.policy.flops import Counts, count_tokens
from speciarl_jax.rollout.engine import RolloutStats
from speciarl_jax.rollout.groups import (
    Groups,
    Origin,
    Pending,
    RolloutBatch,
    SubmitsPairs,
    await_verdicts,
    collect_groups,
)
from speciarl_jax.rollout.sampling import training_sampling
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.timing import Clock, num_compiled
from speciarl_jax.types import Metrics


@dataclasses.dataclass(frozen=True)
class _Part:
    """One generation batch, the work it took, and programs that its images had to wait for."""

    batch: PromptBatch
    image_embeds: AnyArray
    groups: Groups
    pending: Pending
    work: RolloutStats
    compiled: int


def gather_rollouts(
    session: Session,
    judge: SubmitsPairs,
    state: TrainState,
    loader: PromptLoader,
    step: int,
    clock: Clock,
    poll: Poll | None = None,
) -> RolloutBatch:
    """Samples G answers for each prompt of a step; without dynamic sampling labels come later.

    Args:
        session: model and engine.
        judge: labels answers in the background.
        state: the policy that samples.
        loader: the next prompts.
        step: the step that will learn from the answers; part of their randomness.
        clock: gets laps data, rollout and judge.
        poll: called between chunks of decoding and while labels are awaited; starts other work
            (`train.async_steps`) or raises to leave the step.

    Raises:
        TrainingStopped: dynamic sampling found too few groups to learn from, or the judge leaves
            too many answers without a label.
        JudgeError: the judge gave up.
    """
    config, engine, start = session.config, session.engine, loader.get_state()
    states, poll = session.sampling_states(state.trainable), poll or session.agree
    version = int(state.optim.num_updates)  # read now: an overlapping update donates it

    def sample() -> _Part:
        """One generation batch; its labels are already on their way."""
        batch = session.pad_alike(next(loader))
        clock.lap("data")
        compiled = num_compiled()
        image_embeds = session.encode(states, batch)
        compiled = num_compiled() - compiled
        finished = engine.generate(
            states,
            batch,
            image_embeds,
            group_size=config.rollout.group_size,
            sampling=training_sampling(config),
            seed=config.seed,
            step=step,
            poll=poll,
        )
        groups, pending = collect_groups(
            finished,
            batch,
            config.rollout.group_size,
            session.vocabulary,
            judge,
            step=step,
            policy_version=version,
        )
        clock.lap("rollout")
        own_embeds = own_prompts(image_embeds)
        return _Part(batch, own_embeds, groups, pending, engine.stats, compiled)

    if config.algo.dynamic_sampling:
        parts, rows, stats = _sample_until_full(config, step, sample, clock, poll)
    else:
        parts, rows, stats = [sample()], None, {}
    # The groups that are kept, in the order of their prompts, as one batch.
    groups = [group for part in parts for group in part.groups]
    batch, image_embeds = join_prompts(session, [(p.batch, p.image_embeds) for p in parts], rows)
    return RolloutBatch(
        step=step,
        sampled_after=state.step,
        batch=batch,
        image_embeds=image_embeds,
        groups=groups if rows is None else [groups[row] for row in rows],
        pending=parts[0].pending if rows is None else [],
        origin=Origin(start, len(parts), rows),
        stats=_decoding_metrics(parts) | stats,
        sampled=sum((count_batch(session, p.batch, p.groups) for p in parts), Counts()),
    )


def _decoding_metrics(parts: list[_Part]) -> Metrics:
    """How full the decode batches were, and how many programs had to be waited for."""
    works = [part.work for part in parts]
    used = sum(work.live_steps for work in works) / sum(work.slot_steps for work in works)
    waited = sum(part.compiled + part.work.recompilations for part in parts)
    return {"rollout/slot_utilization": used, "rollout/recompilations": float(waited)}


def count_batch(session: Session, batch: PromptBatch, groups: Groups) -> Counts:
    """Real tokens and patches of prompts and their answers, for `flops`."""
    lengths = np.array([[len(r.completion_tokens) for r in group] for group in groups])
    mask = batch.vision.mask
    windows = mask.reshape(len(mask), -1, session.arch.vision.window_patches).sum(axis=2)
    return count_tokens(batch.prompt_lengths[batch.is_real], lengths, windows)


def _sample_until_full(
    config: Config, step: int, sample: Callable[[], _Part], clock: Clock, poll: Poll
) -> tuple[list[_Part], np.ndarray, Metrics]:
    """DAPO's dynamic sampling.

    Every process fills its own share, as a group stays where it was sampled, and all go on until
    the last one has: they see the same number of batches.

    Returns:
        (generation batches, rows [P] kept of them, metrics). Of more kept groups than needed the
        first in the order of the prompts are used and the rest is dropped.
    """
    needed = config.train.prompts_per_step // processes.num_shares()
    parts: list[_Part] = []
    codes: list[np.ndarray] = []
    keep = np.zeros(0, bool)
    while processes.any_process(bool(keep.sum() < needed)):
        if len(parts) == config.algo.max_generation_batches:
            everywhere = processes.gather_prompts(keep)
            raise TrainingStopped(_too_few_lessons(config, step, codes, everywhere))
        part = sample()
        await_verdicts(part.pending, poll)
        clock.lap("judge")
        parts.append(part)
        own = label_codes(config, part.groups, part.batch.global_index, step)
        keep = np.concatenate([keep, has_lesson(config, own)])
        codes.append(processes.gather_prompts(own))
        check_failed_budget(config, codes, step)
    dropped = dropped_groups(np.concatenate(codes), config.algo.failed_quorum_frac)
    kept = float(processes.gather_prompts(keep).mean())
    stats = {
        "rollout/generation_batches": float(len(parts)),
        "group/kept_frac": kept,
        "group/zero_std_frac": 1.0 - kept,
        "group/dropped_frac": float(dropped.mean()),
    }
    return parts, np.flatnonzero(keep)[:needed], stats


def _too_few_lessons(config: Config, step: int, codes: list[np.ndarray], keep: np.ndarray) -> str:
    dropped = int(dropped_groups(np.concatenate(codes), config.algo.failed_quorum_frac).sum())
    equal = len(keep) - int(keep.sum()) - dropped
    return (
        f"step {step}: {len(codes)} generation batches gave {int(keep.sum())} of "
        f"{config.train.prompts_per_step} groups whose rewards differ (of {len(keep)}, {equal} had "
        f"equal rewards, {dropped} too few labels); raise algo.max_generation_batches="
        f"{config.algo.max_generation_batches}, algo.generation_prompts or rollout.group_size, "
        "take harder or more varied data, or set algo.dynamic_sampling=false, then --resume"
    )


def join_prompts(
    session: Session, parts: list[tuple[PromptBatch, AnyArray]], rows: np.ndarray | None
) -> tuple[PromptBatch, AnyArray]:
    """The prompts `rows` of several generation batches as one batch, with their embeddings.

    None takes the one batch as it is.
    """
    if rows is None:
        (whole,) = parts
        return whole
    pad_id = int(session.vocabulary.stop_ids[0])
    joined, embeds = batches.join_batches(parts, rows, session.arch.vision.merge_unit, pad_id)
    assert embeds is not None, "parts with embeddings are joined with them"
    return joined, embeds


def read_again(
    session: Session, state: TrainState, loader: PromptLoader, origin: Origin
) -> tuple[PromptBatch, AnyArray]:
    """The prompts of an earlier `gather_rollouts` and their embeddings, bit for bit.

    The loader then stands where it stood after that call.

    Raises:
        ValueError: the data are not those of the saved position.
    """
    loader.set_state(origin.data)
    states = session.sampling_states(state.trainable)
    parts = []
    for _ in range(origin.num_batches):
        batch = session.pad_alike(next(loader))
        parts.append((batch, own_prompts(session.encode(states, batch))))
    return join_prompts(session, parts, origin.rows)
