"""One step of the algorithm, top to bottom: `run_step`.

    sample groups (decode; finished answers go to the judge at once)
    -> labels -> best-of-N reward -> group advantages -> token weights
    -> mini-batches -> one optimiser update each

`speciarl_jax.train` repeats it. What differs from the paper: nothing in the
mathematics; a label that is missing masks its rollout (the released code scores it 0.0), and the
loss is normalised over the whole mini-batch (``algo.normalization="verl"`` gives the original).
"""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
import optax
from jaxtyping import Array

from speciarl_jax import advantage, batching, reward, weights
from speciarl_jax.checkpoint import TrainState
from speciarl_jax.config import Config
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.loss import importance_weights
from speciarl_jax.metrics import category_metrics
from speciarl_jax.rollout.groups import Pending, await_verdicts, collect_groups
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import Session
from speciarl_jax.types import PromptBatch, Rollout
from speciarl_jax.update import LossConfig, TrainBatch, batch_logprobs, update_step

Metrics = dict[str, float]
Groups = list[list[Rollout]]


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message is one line with the remedy. Everything is saved."""


@dataclasses.dataclass
class Scores:
    """What the host knows of P groups after judging; arrays [P, G].

    Attributes:
        codes: categories and failures, see `reward`.
        rewards: with the overlong penalty, if there is one.
        valid: False for masked rollouts.
        advantages: 0 where not valid.
    """

    codes: np.ndarray
    rewards: np.ndarray
    valid: np.ndarray
    advantages: np.ndarray


def run_step(
    session: Session,
    judge: JudgeThread,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PromptBatch,
) -> tuple[TrainState, Groups, Metrics]:
    """One step: sample, judge, reward, update.

    Returns:
        (state after the step, its judged groups, its metrics).

    Raises:
        JudgeError: the judge gave up; nothing was updated.
        TrainingStopped: too many labels missing, sampler and trainer disagree, or too many
            non-finite gradients.
    """
    clock = Clock()
    config, step = session.config, state.step + 1
    image_embeds = session.encode((state.trainable, session.parts.frozen), batch)
    groups, pending = sample_groups(session, judge, state, batch, image_embeds, step)
    clock.lap("rollout")
    arrays = batching.group_arrays(groups, config.rollout.max_completion_tokens)
    references = reference_logprobs(session, state, batch, arrays, image_embeds)
    await_verdicts(pending)
    clock.lap("judge")
    scores = score_groups(config, groups, arrays.lengths, batch.global_index, step)
    state, metrics = update_policy(
        session, optimizer, state, batch, arrays, scores, references, image_embeds
    )
    clock.lap("update")
    metrics |= rollout_metrics(session, groups, arrays, scores) | clock.metrics(arrays)
    return dataclasses.replace(state, step=step), groups, {"step": step, **metrics}


def sample_groups(
    session: Session,
    judge: JudgeThread,
    state: TrainState,
    batch: PromptBatch,
    image_embeds: Array,
    step: int,
) -> tuple[Groups, Pending]:
    """G answers per prompt; labels are already on their way."""
    config = session.config
    finished = session.engine.generate(
        (state.trainable, session.parts.frozen),
        batch,
        image_embeds,
        group_size=config.rollout.group_size,
        sampling=training_sampling(config),
        seed=config.seed,
        step=step,
    )
    return collect_groups(
        finished,
        batch,
        config.rollout.group_size,
        session.vocabulary,
        judge,
        step=step,
        policy_version=int(state.optim.num_updates),
    )


def training_sampling(config: Config) -> Sampling:
    """Sampling options of training rollouts."""
    rollout = config.rollout
    return Sampling(
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.min_p,
        rollout.repetition_penalty,
    )


def score_groups(
    config: Config, groups: Groups, lengths: np.ndarray, global_index: np.ndarray, step: int
) -> Scores:
    """Rewards and advantages of judged groups; writes both into the rollouts.

    Raises:
        TrainingStopped: more labels are missing than ``algo.failed_budget_frac`` allows.
    """
    algo = config.algo
    codes = reward.category_codes(groups)
    failed = float(np.mean(codes == reward.UNLABELLED))
    if failed > algo.failed_budget_frac:
        raise TrainingStopped(
            f"step {step}: {failed:.0%} of the labels are missing, algo.failed_budget_frac allows "
            f"{algo.failed_budget_frac:.0%}; look at the judge's log, then --resume"
        )
    if algo.label_noise:
        index = global_index[: len(groups)]
        codes = reward.apply_label_noise(codes, algo.label_noise, config.seed, step, index)
    values = reward.rewards(algo.reward, codes, algo.bar_support)
    valid = reward.valid_mask(codes, algo.failed_quorum_frac)
    limit = config.rollout.max_completion_tokens
    shaped = values + reward.overlong_penalty(lengths, limit, algo.overlong_buffer_tokens)
    advantages = advantage.resolve(algo.name, algo.norm_by_std)(shaped, valid)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            rollout.reward = float(shaped[p, g])
            rollout.advantage = float(advantages[p, g])
    return Scores(codes, shaped, valid, advantages)


def loss_config(config: Config) -> LossConfig:
    """The static part of the loss."""
    algo = config.algo
    objectives = {"sft": "sft", "gspo": "gspo"}
    return LossConfig(
        objective=objectives.get(algo.name, "policy"),
        clip_eps_low=algo.clip_eps_low,
        clip_eps_high=algo.clip_eps_high,
        clip_dual=algo.clip_dual,
        kl_coef=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        temperature=1.0 if algo.name == "sft" else config.rollout.temperature,
        remat=config.model.remat,
        logprob_chunk_tokens=config.train.logprob_chunk_tokens,
        train_vision=config.model.train_vision,
    )


def update_batch(
    session: Session,
    batch: PromptBatch,
    arrays: batching.GroupArrays,
    scores: Scores | None,
    image_embeds: Array,
) -> TrainBatch:
    """The whole rollout batch on device layout; weights per mini-batch."""
    config = session.config
    shape = arrays.lengths.shape
    token_weights = np.zeros((*shape, arrays.tokens.shape[2]), np.float32)
    advantages = np.zeros(shape, np.float32)
    if scores is not None:
        advantages = scores.advantages
        for rows in mini_batches(config):
            token_weights[rows] = mini_batch_weights(config, arrays, scores.valid, rows)
    trained_images = None if config.model.train_vision else image_embeds
    unit = session.arch.vision.merge_unit
    return batching.make_train_batch(batch, arrays, token_weights, advantages, trained_images, unit)


def mini_batches(config: Config) -> list[slice]:
    """Rows of each update of a step."""
    size = config.train.prompts_per_update
    return [slice(start, start + size) for start in range(0, config.train.prompts_per_step, size)]


def mini_batch_weights(
    config: Config, arrays: batching.GroupArrays, valid: np.ndarray, rows: slice
) -> np.ndarray:
    """Aggregation weights [P, G, C] of one mini-batch; they do not know of micro-batches."""
    algo = config.algo
    lengths = arrays.lengths[rows]
    flat = weights.token_weights(
        lengths.reshape(-1),
        valid[rows].reshape(-1),
        arrays.tokens.shape[2],
        algo.aggregation,
        algo.normalization,
        algo.verl_micro_batch,
        algo.verl_ranks,
        loss_norm_tokens=config.rollout.max_completion_tokens,
    )
    return flat.reshape(*lengths.shape, -1)


@dataclasses.dataclass
class References:
    """Log-probs of the sampled tokens that the loss compares with; [P, G, C] or None.

    Attributes:
        old: the rollout's parameters, trainer's program; None if this step has one update, whose
            own log-probs they are.
        ref: the policy without its adapter; None without KL.
    """

    old: Array | None
    ref: Array | None


def reference_logprobs(
    session: Session,
    state: TrainState,
    batch: PromptBatch,
    arrays: batching.GroupArrays,
    image_embeds: Array,
) -> References:
    """Starts the forward passes that need no labels, while the judge is still at work."""
    config, parts = session.config, session.parts
    has_several = len(mini_batches(config)) > 1 and config.algo.old_logprobs == "recompute"
    needs_old = has_several or config.algo.importance_cap > 0
    if not needs_old and not config.algo.kl_coef:
        return References(None, None)
    whole = update_batch(session, batch, arrays, None, image_embeds)
    size = config.train.prompts_per_micro_batch
    micro = batching.micro_batches(whole, slice(None), size)
    settings = loss_config(config)

    def run(graphdef: object, *states: object) -> Array:
        logprobs = batch_logprobs(graphdef, states, micro, session.vocabulary.banned, settings)
        return batching.join_micro_batches(logprobs)

    old = run(parts.graphdef, state.trainable, parts.frozen) if needs_old else None
    ref = run(parts.reference_graphdef, parts.frozen) if config.algo.kl_coef else None
    return References(old, ref)


def update_policy(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: PromptBatch,
    arrays: batching.GroupArrays,
    scores: Scores,
    references: References,
    image_embeds: Array,
) -> tuple[TrainState, Metrics]:
    """One optimiser update per mini-batch; metrics are those of the whole step.

    Raises:
        TrainingStopped: see `run_step`.
    """
    config = session.config
    whole = update_batch(session, batch, arrays, scores, image_embeds)
    whole = dataclasses.replace(whole, ref_logprobs=references.ref, old_logprobs=references.old)
    if config.algo.importance_cap:
        corrected = importance_weights(
            references.old, arrays.rollout_logprobs, config.algo.importance_cap
        )
        whole = dataclasses.replace(whole, importance=corrected)
    if config.algo.old_logprobs == "rollout":
        whole = dataclasses.replace(whole, old_logprobs=arrays.rollout_logprobs)
    state, stats, logprobs = apply_updates(session, optimizer, state, whole)
    first = mini_batches(config)[0]
    mismatch = mismatch_metrics(logprobs, arrays, first, config, state.step + 1)
    return state, _rename_clips(stats) | mismatch


def apply_updates(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    whole: TrainBatch,
) -> tuple[TrainState, Metrics, Array]:
    """Runs the optimiser over the mini-batches of a step.

    Returns:
        (state, ``policy/*`` statistics averaged over the updates, log-probs [U, P, G, C] of the
        first mini-batch before its update).

    Raises:
        TrainingStopped: too many gradients in a row were not finite.
    """
    config = session.config
    trainable, optim = state.trainable, state.optim
    all_stats, first_logprobs = [], None
    for rows in mini_batches(config):
        micro = batching.micro_batches(whole, rows, config.train.prompts_per_micro_batch)
        trainable, optim, stats = update_step(
            session.parts.graphdef,
            trainable,
            session.parts.frozen,
            optim,
            micro,
            session.vocabulary.banned,
            optimizer,
            loss_config(config),
        )
        logprobs = stats.pop("logprobs")
        first_logprobs = logprobs if first_logprobs is None else first_logprobs
        all_stats.append(jax.device_get(stats))
    _check_skipped(config, int(optim.num_skipped_in_row), state.step + 1)
    names = all_stats[0]
    metrics = {f"policy/{k}": float(np.mean([s[k] for s in all_stats])) for k in names}
    return dataclasses.replace(state, trainable=trainable, optim=optim), metrics, first_logprobs


def _rename_clips(metrics: Metrics) -> Metrics:
    """clip_low -> clip_low_frac; the weights of a token-mean add up to 1."""
    clips = ("policy/clip_low", "policy/clip_high", "policy/dual")
    return {(f"{k}_frac" if k in clips else k): v for k, v in metrics.items()}


def mismatch_metrics(
    logprobs: Array, arrays: batching.GroupArrays, rows: slice, config: Config, step: int
) -> Metrics:
    """How far sampler and trainer are apart on the tokens of the first mini-batch.

    Raises:
        TrainingStopped: at step one, further than ``train.mismatch_gate`` (in float32 the maximum,
            in bfloat16 the mean).
    """
    trainer = np.asarray(jax.device_get(batching.join_micro_batches(logprobs)))
    sampler, lengths = arrays.rollout_logprobs[rows], arrays.lengths[rows]
    is_token = np.arange(sampler.shape[2]) < lengths[..., None]
    gaps = np.abs(trainer - sampler)[is_token]
    metrics = {
        "mismatch/logprob_max_abs": float(gaps.max(initial=0.0)),
        "mismatch/logprob_mean_abs": float(gaps.mean()) if gaps.size else 0.0,
        "mismatch/logprob_p99_abs": float(np.quantile(gaps, 0.99)) if gaps.size else 0.0,
    }
    is_float32 = config.model.compute_dtype == "float32"
    name = "max" if is_float32 else "mean"
    gap = metrics[f"mismatch/logprob_{name}_abs"]
    if step == 1 and gap > config.train.mismatch_gate:
        raise TrainingStopped(
            f"step 1: log-probs of sampler and trainer differ by {gap:.2e} ({name}), "
            f"train.mismatch_gate allows {config.train.mismatch_gate:.0e}; rewards would train "
            "the wrong tokens"
        )
    return metrics


def _check_skipped(config: Config, skipped: int, step: int) -> None:
    if skipped >= config.optim.max_skipped_updates:
        raise TrainingStopped(
            f"step {step}: {skipped} updates in a row had a gradient that is not finite "
            "(optim.max_skipped_updates); lower optim.learning_rate and resume from a checkpoint"
        )


def rollout_metrics(
    session: Session, groups: Groups, arrays: batching.GroupArrays, scores: Scores
) -> Metrics:
    """Rewards, categories, lengths and group statistics of a step."""
    valid, lengths = scores.valid, arrays.lengths
    kept = scores.rewards[valid]
    dropped = reward.dropped_groups(scores.codes, session.config.algo.failed_quorum_frac)
    truncated = [[r.is_truncated for r in group] for group in groups]
    return {
        "reward/mean": float(kept.mean()) if kept.size else 0.0,
        "reward/std": float(kept.std()) if kept.size else 0.0,
        **category_metrics(scores.codes),
        "group/zero_std_frac": float(np.mean(~advantage.has_spread(scores.rewards, valid))),
        "group/dropped_frac": float(np.mean(dropped)),
        "rollout/tokens_mean": float(lengths.mean()),
        "rollout/tokens_max": float(lengths.max()),
        "rollout/truncated_frac": float(np.mean(truncated)),
        "rollout/slot_utilization": session.engine.stats.slot_utilization,
    }


class Clock:
    """Wall time of the parts of a step."""

    def __init__(self) -> None:
        """Starts now."""
        self._start = self._last = time.perf_counter()
        self._laps: Metrics = {}

    def lap(self, name: str) -> None:
        """Ends the part `name`."""
        now = time.perf_counter()
        self._laps[f"time/{name}_s"] = now - self._last
        self._last = now

    def metrics(self, arrays: batching.GroupArrays) -> Metrics:
        """Seconds of each part and of the step, and sampled tokens per second."""
        total = time.perf_counter() - self._start
        rate = float(arrays.lengths.sum()) / total
        return {
            **self._laps,
            "time/step_s": total,
            "judge/wait_frac": self._laps["time/judge_s"] / total,
            "throughput/tokens_per_s": rate,
            "throughput/tokens_per_s_per_chip": rate / jax.device_count(),
        }
