"""What a step reports: rewards, categories, lengths, clipping, agreement of the log-probs.

Pure functions of what the step leaves; none of them stops a run.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from speciarl_jax.algorithm.credit import Credit
from speciarl_jax.algorithm.gather import count_batch
from speciarl_jax.algorithm.learn import (
    References,
    Sequences,
    Update,
    mini_batch_packs,
    mini_batches,
)
from speciarl_jax.config.schema import Config
from speciarl_jax.devices import processes
from speciarl_jax.learner.batches import Completions
from speciarl_jax.objective import advantage, reward
from speciarl_jax.policy import flops
from speciarl_jax.policy.flops import Counts
from speciarl_jax.policy.layers import LoRAParam
from speciarl_jax.policy.model import count_parameters
from speciarl_jax.rollout.groups import RolloutBatch
from speciarl_jax.run.session import Session
from speciarl_jax.types import Category, Metrics

LENGTH_QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Learned:
    """One step's work, in the order in which it came about."""

    rollouts: RolloutBatch
    sequences: Sequences
    credit: Credit
    references: References
    update: Update


def learning_metrics(config: Config, learned: Learned) -> Metrics:
    """How far sampler and trainer are apart on the tokens of the first mini-batch.

    With ``train.async_steps=1`` the parameters differ by a step too, from step two on. Under
    ``algo.importance_cap`` also the mean of the truncated weights and the share held at the cap.
    """
    completions, rows = learned.sequences.completions, mini_batches(config)[0]
    is_token = np.arange(completions.completion_tokens.shape[2]) < completions.lengths[..., None]
    trainer = np.asarray(jax.device_get(learned.update.logprobs))
    gaps = _token_values(np.abs(trainer - completions.rollout_logprobs[rows]), is_token[rows])
    metrics = {
        "mismatch/logprob_max_abs": float(gaps.max(initial=0.0)),
        "mismatch/logprob_mean_abs": float(gaps.mean()) if gaps.size else 0.0,
        "mismatch/logprob_p99_abs": float(np.quantile(gaps, 0.99)) if gaps.size else 0.0,
    }
    if cap := config.algo.importance_cap:
        gaps = np.asarray(learned.references.old) - completions.rollout_logprobs
        gaps = _token_values(gaps, is_token).astype(np.float64)
        ratios = np.exp(np.clip(gaps, -20, 20))
        metrics["policy/importance_mean"] = float(np.minimum(ratios, cap).mean())
        metrics["policy/importance_capped_frac"] = float(np.mean(ratios > cap))
    return metrics


def _token_values(values: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """The values at tokens, of all processes."""
    found: np.ndarray = processes.gather_prompts(values)[processes.gather_prompts(is_token)]
    return found


def step_metrics(
    session: Session, judge: Metrics, learned: Learned, laps: Metrics, sampled: Counts
) -> Metrics:
    """Rewards, answers, times and rates of a finished step.

    ``judge/wait_frac`` is the share of the step in which nothing but the judge kept it waiting.

    Args:
        session: model and recipe.
        judge: its running totals.
        learned: what the step learned from.
        laps: of its `Clock`.
        sampled: what was sampled within the step, for this step or the next.
    """
    completions, seconds = learned.sequences.completions, laps["time/step_s"]
    rate = float(processes.gather(completions.lengths).sum()) / seconds
    return {
        **rollout_metrics(session.config, learned.rollouts, completions, learned.credit),
        **laps,
        "judge/wait_frac": laps["time/judge_s"] / seconds,
        "throughput/tokens_per_s": rate,
        "throughput/tokens_per_s_per_chip": rate / session.mesh.size,
        **judge,
        **throughput_metrics(session, learned, sampled, seconds),
    }


def rollout_metrics(
    config: Config, rollouts: RolloutBatch, completions: Completions, credit: Credit
) -> Metrics:
    """Rewards, categories, lengths and group statistics of the answers that were trained on.

    All processes' answers together. With dynamic sampling ``group/*`` counts all groups that were
    sampled, dropped ones included.
    """
    is_truncated = np.array([[r.is_truncated for r in group] for group in rollouts.groups])
    parts = (credit.valid, completions.lengths, credit.rewards, credit.codes, is_truncated)
    valid, lengths, rewards, codes, truncated = (processes.gather_prompts(x) for x in parts)
    kept = rewards[valid]
    dropped = reward.dropped_groups(codes, config.algo.failed_quorum_frac)
    return {
        "reward/mean": float(kept.mean()) if kept.size else 0.0,
        "reward/std": float(kept.std()) if kept.size else 0.0,
        **category_metrics(codes),
        "group/zero_std_frac": float(np.mean(~advantage.has_spread(rewards, valid))),
        "group/dropped_frac": float(np.mean(dropped)),
        "rollout/tokens_mean": float(lengths.mean()),
        "rollout/tokens_min": float(lengths.min()),
        **{
            f"rollout/tokens_p{q * 100:.0f}": float(np.quantile(lengths, q))
            for q in LENGTH_QUANTILES
        },
        "rollout/tokens_max": float(lengths.max()),
        "rollout/truncated_frac": float(np.mean(truncated)),
        "rollout/staleness": float(rollouts.step - 1 - rollouts.sampled_after),
        **processes.mean(rollouts.stats),
    }


def throughput_metrics(
    session: Session, learned: Learned, sampled: Counts, seconds: float
) -> Metrics:
    """Model FLOP/s per device, their share of its peak where that is known, and padding."""
    adapter = nnx.filter_state(session.parts.trainable, LoRAParam)
    training = flops.Training.of(session.config, count_parameters(adapter))
    rollouts = learned.rollouts
    counts = count_batch(session, rollouts.batch, rollouts.groups)
    parts = {
        **flops.sampling_flops(session.arch, sampled, training.adapter_params),
        **flops.learning_flops(session.arch, counts, training),
    }
    everywhere = float(processes.gather(np.asarray(sum(parts.values()), np.float64)).sum())
    rate = everywhere / seconds / session.mesh.size
    metrics = {
        "throughput/model_tflops_per_s": rate / 1e12,
        "throughput/padding_frac": _padding_frac(session, learned.sequences),
    }
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        metrics["throughput/mfu"] = rate / peak
    return metrics


def _padding_frac(session: Session, sequences: Sequences) -> float:
    """Share of the update's tokens that are padding."""
    config, batch = session.config, sequences.batch
    prompts, lengths = batch.prompt_lengths, sequences.completions.lengths
    if config.train.micro_batch_tokens:
        packs = [
            pack
            for rows in mini_batches(config)
            for pack in mini_batch_packs(session, sequences, rows)
        ]
        padded = sum(pack.padded_tokens(lengths.shape[1]) for pack in packs)
    else:
        prompt, width = batch.tokens.shape[1], sequences.completions.completion_tokens.shape[2]
        padded = len(lengths) * (prompt + lengths.shape[1] * width)
    return 1 - float(prompts.sum() + lengths.sum()) / padded


def category_metrics(codes: np.ndarray) -> dict[str, float]:
    """Share of each category among all rollouts, failures included; they add up to 1."""
    names = {category.label: int(category) for category in Category}
    names |= {"format_failure": reward.FORMAT_FAILURE, "judge_failure": reward.UNLABELLED}
    return {f"category/{name}_frac": float(np.mean(codes == code)) for name, code in names.items()}
