"""From finished rows to judged groups: text, prediction, labels that arrive while others decode."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.devices.layout import AnyArray
from speciarl_jax.devices.processes import Poll, alone, from_speaker, is_only_speaker, speaks
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Outcome, Pair
from speciarl_jax.judge.parse import extract_answer
from speciarl_jax.policy.flops import Counts
from speciarl_jax.policy.vocabulary import Vocabulary
from speciarl_jax.rollout.finished import FinishedRow
from speciarl_jax.types import Category, Failure, FailureKind, JsonObject, Rollout, Verdict


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which prompts of the run's global order a step uses, so that they can be read again.

    Attributes:
        data: the loader's state before the first of them.
        num_batches: batches read from there.
        rows: [P] the prompts used, counted over those batches in order; None for all.
    """

    data: JsonObject
    num_batches: int
    rows: np.ndarray | None


@dataclasses.dataclass
class RolloutBatch:
    """P groups for one step, labelled or waiting for their labels.

    Attributes:
        step: the step that learns from them.
        sampled_after: finished steps of the policy that sampled them; step - 1 is on-policy.
        batch: their prompts.
        image_embeds: [I*M, D] of those prompts; on the host if they lay with others' on the device.
        groups: in the order of the prompts, each in sample order.
        pending: labels under way; empty once they are all there.
        origin: where the prompts came from.
        stats: metrics of sampling them.
        sampled: tokens and patches of all that was sampled, dropped groups included.
    """

    step: int
    sampled_after: int
    batch: PromptBatch
    image_embeds: AnyArray
    groups: Groups
    pending: Pending
    origin: Origin
    stats: dict[str, float]
    sampled: Counts

    @property
    def is_judged(self) -> bool:
        """All labels have arrived."""
        return all(future.done() for _, future in self.pending)


Groups = list[list[Rollout]]


_POLL_EVERY_S = 0.5
Pending = list[tuple[list[Rollout], "concurrent.futures.Future[list[Outcome]]"]]


@runtime_checkable
class SubmitsPairs(Protocol):
    """The part of `judge.runner.JudgeThread` that collecting needs."""

    def submit(self, pairs: list[Pair], step: int = 0) -> concurrent.futures.Future[list[Outcome]]:
        """Starts labelling."""


def collect_groups(
    finished: Iterable[list[FinishedRow]],
    batch: PromptBatch,
    group_size: int,
    vocabulary: Vocabulary,
    judge: SubmitsPairs,
    *,
    step: int,
    policy_version: int,
) -> tuple[list[list[Rollout]], Pending]:
    """Gathers answers into groups and sends each to the judge the moment it is finished.

    Args:
        finished: what `RolloutEngine.generate` yields.
        batch, group_size, vocabulary: as the engine got them.
        judge: labels pairs in the background; format failures are not sent.
        step: training step, for the judge's log.
        policy_version: updates that the sampling policy had seen.

    Returns:
        (groups of the real prompts in batch order, each in sample order; labels under way).
    """
    groups: dict[int, list[Rollout | None]] = {}
    pending: Pending = []
    stop_ids = set(vocabulary.stop_ids.tolist())
    for rows in finished:
        rollouts = []
        for row in rows:
            rollout = _to_rollout(row, batch, vocabulary, stop_ids, policy_version)
            groups.setdefault(row.prompt, [None] * group_size)[row.sample] = rollout
            rollouts.append(rollout)
        answered = [r for r in rollouts if r.prediction is not None]
        if answered:
            pairs = [Pair(r.ground_truth, r.prediction or "") for r in answered]
            pending.append((answered, judge.submit(pairs, step) if speaks() else _heard_later()))
    complete = [[r for r in groups[prompt] if r is not None] for prompt in sorted(groups)]
    return complete, pending


def _to_rollout(
    row: FinishedRow,
    batch: PromptBatch,
    vocabulary: Vocabulary,
    stop_ids: set[int],
    policy_version: int,
) -> Rollout:
    text_tokens = (
        row.completion_tokens[:-1]
        if int(row.completion_tokens[-1]) in stop_ids
        else row.completion_tokens
    )
    completion = vocabulary.decode(text_tokens.tolist())
    return Rollout(
        prompt_id=batch.prompt_ids[row.prompt],
        dataset=batch.datasets[row.prompt],
        ground_truth=batch.ground_truths[row.prompt],
        sample_index=row.sample,
        completion_tokens=row.completion_tokens,
        rollout_logprobs=row.logprobs,
        completion=completion,
        prediction=extract_answer(completion),
        is_truncated=row.is_truncated,
        policy_version=policy_version,
    )


def await_verdicts(pending: Pending, poll: Poll = alone) -> None:
    """Waits for all labels and writes them into their rollouts, in rollout order.

    Processes that sample together wait until all have theirs.

    Args:
        pending: labels under way.
        poll: called every half second of waiting, see `RolloutEngine.generate`; may raise.

    Raises:
        JudgeError: the judge gave up; see `speciarl_jax.judge`.
    """
    futures = [future for _, future in pending]
    while True:
        waiting = concurrent.futures.wait(futures, 0).not_done
        error = next((e for f in futures if f not in waiting and (e := _judge_error(f))), None)
        (is_awaited,) = poll(int(bool(waiting)), error=error)
        if not is_awaited:
            break
        concurrent.futures.wait(waiting, _POLL_EVERY_S)
    labels = hear([future.result() for future in futures])
    for (rollouts, _), outcomes in zip(pending, labels, strict=True):
        for rollout, outcome in zip(rollouts, outcomes, strict=True):
            rollout.outcome = outcome


def _heard_later() -> concurrent.futures.Future[list[Outcome]]:
    """In place of a question that another process asks, which has the same answers; see `hear`."""
    nothing: concurrent.futures.Future[list[Outcome]] = concurrent.futures.Future()
    nothing.set_result([])
    return nothing


def hear(labels: list[list[Outcome]]) -> list[list[Outcome]]:
    """Labels by the process that asks, also in those that have the same prompts."""
    if is_only_speaker():
        return labels
    plain = [[outcome_to_json(outcome) for outcome in part] for part in labels]
    return [[outcome_from_json(fields) for fields in part] for part in from_speaker(plain)]


def outcome_to_json(outcome: Outcome) -> JsonObject:
    """A label, or why there is none, as plain JSON values."""
    fields: JsonObject = dataclasses.asdict(outcome)
    if isinstance(outcome, Verdict):
        fields["category"] = outcome.category.label
    return fields


def outcome_from_json(fields: JsonObject) -> Outcome:
    """What `outcome_to_json` was given."""
    if "kind" in fields:
        return Failure(FailureKind(str(fields["kind"])), str(fields["message"]))
    category = Category.from_label(str(fields["category"]))
    return Verdict(category, str(fields["judge"]), bool(fields["is_cached"]))


def _judge_error(future: concurrent.futures.Future[list[Outcome]]) -> JudgeError | None:
    """What a label's future ended with, if the judge gave up."""
    error = future.exception()
    return error if isinstance(error, JudgeError) else None
