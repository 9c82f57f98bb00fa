"""What a step reports: rewards, categories, lengths, clipping, agreement of the log-probs."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from speciarl_jax import advantage, flops, hosts, reward
from speciarl_jax.batching import GroupArrays
from speciarl_jax.config import Config
from speciarl_jax.flops import Counts
from speciarl_jax.gather import RolloutBatch, count_batch
from speciarl_jax.learn import References, Update, mini_batch_packs, mini_batches
from speciarl_jax.metrics import category_metrics
from speciarl_jax.policy.layers import LoRAParam
from speciarl_jax.policy.model import count_parameters
from speciarl_jax.scores import Scores, TrainingStopped
from speciarl_jax.session import Session

Metrics = dict[str, float]
LENGTH_QUANTILES = (0.1, 0.5, 0.9)


def rollout_metrics(
    config: Config, rollouts: RolloutBatch, arrays: GroupArrays, scores: Scores
) -> Metrics:
    """Rewards, categories, lengths and group statistics of the answers that were trained on.

    All processes' answers together. With dynamic sampling ``group/*`` counts all groups that were
    sampled, dropped ones included.
    """
    is_truncated = np.array([[r.is_truncated for r in group] for group in rollouts.groups])
    parts = (scores.valid, arrays.lengths, scores.rewards, scores.codes, is_truncated)
    valid, lengths, rewards, codes, truncated = (hosts.gather_prompts(x) for x in parts)
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
        **hosts.mean(rollouts.stats),
    }


def importance_metrics(config: Config, references: References, arrays: GroupArrays) -> Metrics:
    """Mean of the truncated importance weights, and the share of tokens held at the cap."""
    cap = config.algo.importance_cap
    if not cap:
        return {}
    gaps = _token_values(np.asarray(references.old) - arrays.rollout_logprobs, _is_token(arrays))
    ratios = np.exp(np.clip(gaps.astype(np.float64), -20, 20))
    return {
        "policy/importance_mean": float(np.minimum(ratios, cap).mean()),
        "policy/importance_capped_frac": float(np.mean(ratios > cap)),
    }


def mismatch_metrics(config: Config, update: Update, arrays: GroupArrays, step: int) -> Metrics:
    """How far sampler and trainer are apart on the tokens of the first mini-batch.

    With ``train.async_steps=1`` the parameters differ by a step too, from step two on.

    Raises:
        TrainingStopped: at step one, further than ``train.mismatch_gate`` (in float32 the maximum,
            in bfloat16 the mean).
    """
    rows = mini_batches(config)[0]
    trainer = np.asarray(jax.device_get(update.logprobs))
    gaps = np.abs(trainer - arrays.rollout_logprobs[rows])
    gaps = _token_values(gaps, _is_token(arrays)[rows])
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


def _token_values(values: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """The values at tokens, of all processes."""
    return hosts.gather_prompts(values)[hosts.gather_prompts(is_token)]


def _is_token(arrays: GroupArrays) -> np.ndarray:
    return np.arange(arrays.tokens.shape[2]) < arrays.lengths[..., None]


def rename_clips(metrics: Metrics) -> Metrics:
    """clip_low -> clip_low_frac; the weights of a token-mean add up to 1."""
    clips = ("policy/clip_low", "policy/clip_high", "policy/dual")
    return {(f"{k}_frac" if k in clips else k): v for k, v in metrics.items()}


def time_metrics(laps: Metrics, arrays: GroupArrays, judge: Metrics, num_devices: int) -> Metrics:
    """Rates of a step from its `Clock`, and the judge's running totals.

    ``judge/wait_frac`` is the share of the step in which nothing but the judge kept it waiting.
    """
    total = laps["time/step_s"]
    rate = float(hosts.gather(arrays.lengths).sum()) / total
    return {
        **laps,
        "judge/wait_frac": laps["time/judge_s"] / total,
        "throughput/tokens_per_s": rate,
        "throughput/tokens_per_s_per_chip": rate / num_devices,
        **judge,
    }


def throughput_metrics(
    session: Session, rollouts: RolloutBatch, arrays: GroupArrays, sampled: Counts, seconds: float
) -> Metrics:
    """Model FLOP/s per device, their share of its peak where that is known, and padding.

    Args:
        session: architecture and recipe.
        rollouts: what was learned from.
        arrays: its completions.
        sampled: what was sampled within the step.
        seconds: of the step.
    """
    training = training_of(session)
    learned = count_batch(session, rollouts.batch, rollouts.groups)
    parts = {
        **flops.sampling_flops(session.arch, sampled, training.adapter_params),
        **flops.learning_flops(session.arch, learned, training),
    }
    everywhere = float(hosts.gather(np.float64(sum(parts.values()))).sum())
    rate = everywhere / seconds / session.mesh.size
    metrics = {
        "throughput/model_tflops_per_s": rate / 1e12,
        "throughput/padding_frac": _padding_frac(session, rollouts, arrays),
    }
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        metrics["throughput/mfu"] = rate / peak
    return metrics


def training_of(session: Session) -> flops.Training:
    """What a step of this recipe computes, for `flops`."""
    config = session.config
    has_several = len(mini_batches(config)) > 1 and config.algo.old_logprobs == "recompute"
    is_adapter = not config.model.train_base
    adapter = nnx.filter_state(session.parts.trainable, LoRAParam) if is_adapter else {}
    return flops.Training(
        adapter_params=count_parameters(adapter),
        train_base=config.model.train_base,
        train_vision=config.model.train_vision,
        num_old=int(has_several or config.algo.importance_cap > 0),
        num_reference=int(config.algo.kl_coef > 0),
        remat=config.model.remat,
    )


def _padding_frac(session: Session, rollouts: RolloutBatch, arrays: GroupArrays) -> float:
    """Share of the update's tokens that are padding."""
    config, batch = session.config, rollouts.batch
    prompts, lengths = batch.prompt_lengths, arrays.lengths
    if config.train.micro_batch_tokens:
        packs = [
            pack
            for rows in mini_batches(config)
            for pack in mini_batch_packs(session, batch, lengths, rows)
        ]
        padded = sum(pack.padded_tokens(lengths.shape[1]) for pack in packs)
    else:
        prompt, width = batch.tokens.shape[1], arrays.tokens.shape[2]
        padded = len(lengths) * (prompt + lengths.shape[1] * width)
    return 1 - float(prompts.sum() + lengths.sum()) / padded
