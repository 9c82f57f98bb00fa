"""One step of the algorithm, top to bottom: `run_step`.

    sample groups (decode; finished answers go to the judge at once)
    -> labels -> best-of-N reward -> group advantages -> token weights
    -> mini-batches -> one optimiser update each

`speciarl_jax.train` repeats it; `speciarl_jax.overlap` runs it one step ahead of its labels. What
differs from the paper: nothing in the mathematics; a label that is missing masks its rollout (the
released code scores it 0.0), and the loss is normalised over the whole mini-batch
(``algo.normalization="verl"`` gives the original).
"""

from __future__ import annotations

import dataclasses

import optax

from speciarl_jax import batching, hosts
from speciarl_jax.checkpoint import TrainState
from speciarl_jax.clock import Clock
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.flops import Counts
from speciarl_jax.gather import RolloutBatch, agree_shapes, gather_rollouts
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.learn import (
    References,
    Update,
    finish_update,
    reference_logprobs,
    start_update,
)
from speciarl_jax.rollout.groups import Poll, await_verdicts, no_poll
from speciarl_jax.scores import Scores, TrainingStopped, check_failed_budget, score_groups
from speciarl_jax.session import Session
from speciarl_jax.step_metrics import (
    Metrics,
    importance_metrics,
    mismatch_metrics,
    rename_clips,
    rollout_metrics,
    throughput_metrics,
    time_metrics,
)

__all__ = ["Metrics", "StepResult", "TrainingStopped", "report_step", "run_step"]


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
    poll: Poll = no_poll,
) -> StepResult:
    """One step: sample, judge, reward, update.

    Args:
        session: model and engine.
        judge: labels answers in the background.
        optimizer: of `state`.
        state: after the last step.
        loader: the next prompts.
        poll: called between chunks of work until the update starts; may raise.

    Raises:
        JudgeError: the judge gave up; nothing was updated.
        TrainingStopped: too many labels missing, too few groups to learn from, sampler and trainer
            disagree, or too many non-finite gradients.
    """
    clock = Clock()
    rollouts = gather_rollouts(session, judge, state, loader, state.step + 1, clock, poll)
    lesson = Lesson.begin(session, state, rollouts)
    await_verdicts(rollouts.pending, poll)
    clock.lap("judge")
    lesson.learn(session, optimizer, state)
    state, metrics = lesson.finish(session, state)
    clock.lap("update")
    metrics |= report_step(session, judge, lesson, clock, rollouts.sampled)
    return StepResult(state, rollouts, {"step": state.step, **metrics})


@dataclasses.dataclass
class Lesson:
    """What one step computes from its rollouts, in the order of the fields.

    Attributes:
        rollouts: groups and prompts.
        arrays: their completions, padded.
        references: log-probs that need no labels; under way on the device.
        scores: rewards and advantages, once there are labels.
        update: given to the device, once there are scores.
    """

    rollouts: RolloutBatch
    arrays: batching.GroupArrays
    references: References
    scores: Scores | None = None
    update: Update | None = None

    @classmethod
    def begin(cls, session: Session, state: TrainState, rollouts: RolloutBatch) -> Lesson:
        """Starts old and reference log-probs, which need no labels."""
        limit = session.config.rollout.max_completion_tokens
        batch, embeds = agree_shapes(session, rollouts.batch, rollouts.image_embeds)
        rollouts = dataclasses.replace(rollouts, batch=batch, image_embeds=embeds)
        longest = max(len(r.completion_tokens) for group in rollouts.groups for r in group)
        (longest,) = hosts.largest(longest)
        arrays = batching.group_arrays(rollouts.groups, limit, longest)
        return cls(rollouts, arrays, reference_logprobs(session, state, rollouts, arrays))

    def learn(
        self, session: Session, optimizer: optax.GradientTransformation, state: TrainState
    ) -> None:
        """Labels -> rewards -> advantages -> updates, which the device starts to work on."""
        rollouts, config = self.rollouts, session.config
        index = rollouts.batch.global_index
        self.scores = score_groups(
            config, rollouts.groups, self.arrays.lengths, index, rollouts.step
        )
        check_failed_budget(config, [hosts.gather_prompts(self.scores.codes)], rollouts.step)
        self.update = start_update(
            session, optimizer, state, rollouts, self.arrays, self.scores, self.references
        )

    def finish(self, session: Session, state: TrainState) -> tuple[TrainState, Metrics]:
        """Waits for the updates; the state after the step and ``policy/*``, ``mismatch/*``."""
        config, step = session.config, self.rollouts.step
        state, stats = finish_update(config, state, self.update)
        metrics = rename_clips(stats) | mismatch_metrics(config, self.update, self.arrays, step)
        return dataclasses.replace(state, step=step), metrics


def report_step(
    session: Session, judge: JudgeThread, lesson: Lesson, clock: Clock, sampled: Counts
) -> Metrics:
    """The metrics of a finished lesson that are not the device's.

    Args:
        session: model and recipe.
        judge: for its totals.
        lesson: what was learned.
        clock: of the step.
        sampled: what was sampled within the step, for this step or the next.
    """
    config, arrays = session.config, lesson.arrays
    laps = clock.metrics()
    return {
        **importance_metrics(config, lesson.references, arrays),
        **rollout_metrics(config, lesson.rollouts, arrays, lesson.scores),
        **time_metrics(laps, arrays, judge.stats(), session.mesh.size),
        **throughput_metrics(session, lesson.rollouts, arrays, sampled, laps["time/step_s"]),
    }
