"""Losses per token, pure jnp. The caller reduces: ``jnp.sum(weights * loss)`` (see `weights`).

Log-probs are float32, one per completion token. At masked positions every function gives a finite
value with a finite gradient as long as its inputs are finite there; `weights` then removes it. If
masked log-probs may be infinite or NaN, pass `mask`, which replaces them *before* any arithmetic:
0 * NaN is NaN, in the gradient too, so masking afterwards would be too late.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_MAX_LOG_RATIO = 20.0  # nats; bounds exp() and, outside, stops the gradient
_MAX_KL = 10.0  # nats


class PolicyStats(NamedTuple):
    """What the clipping did, per token; masked positions are meaningless.

    Attributes:
        clip_low: True where A < 0 and rho fell below 1 - eps_low: no gradient.
        clip_high: True where A > 0 and rho rose above 1 + eps_high: no gradient.
        dual: True where A < 0 and the dual clip holds the loss at -A c: no gradient.
        ratio: rho, the importance ratio, gradient stopped.
    """

    clip_low: Bool[Array, "*B C"]
    clip_high: Bool[Array, "*B C"]
    dual: Bool[Array, "*B C"]
    ratio: Float[Array, "*B C"]


def policy_loss(
    policy_logprobs: Float[Array, "*B C"],
    old_logprobs: Float[Array, "*B C"],
    advantages: Float[Array, "*B"] | Float[Array, "*B C"],
    clip_eps_low: float,
    clip_eps_high: float,
    clip_dual: float,
    mask: Bool[Array, "*B C"] | None = None,
) -> tuple[Float[Array, "*B C"], PolicyStats]:
    """Clipped policy-gradient loss per token (PPO; GRPO, Dr.GRPO, DAPO and RLOO share it).

        rho = exp(clip(policy - old, -20, 20))
        L   = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))
        L   = min(-A c, L)                                       where A < 0

    The pessimistic maximum ignores a gain beyond the clip range but never a loss; for A < 0 that
    leaves large rho unbounded, hence the dual clip. Where policy = old the gradient is -A.

    Args:
        policy_logprobs: of the parameters being trained, nats.
        old_logprobs: of the parameters at rollout, nats; a constant.
        advantages: one per sequence, or one per token.
        clip_eps_low: eps below 1, in [0, 1).
        clip_eps_high: eps above 1, >= 0; larger than `clip_eps_low` in DAPO.
        clip_dual: c > 1, static; 0 for no dual clip.
        mask: True for trained tokens; only needed if log-probs may not be finite elsewhere.

    Returns:
        Loss per token, and `PolicyStats`.

    Source: PPO (arXiv 1707.06347) equation 7, dual clip (arXiv 1912.09729) equation 5, DAPO
    (arXiv 2503.14476) equation 10; verl, compute_policy_loss_vanilla.
    """
    policy, old = _finite(mask, policy_logprobs), _finite(mask, old_logprobs)
    ratio = jnp.exp(_clip_log_ratio(policy - jax.lax.stop_gradient(old)))
    per_token = advantages if advantages.ndim == policy.ndim else advantages[..., None]
    return _clipped_loss(ratio, per_token, clip_eps_low, clip_eps_high, clip_dual)


def gspo_loss(
    policy_logprobs: Float[Array, "*B C"],
    old_logprobs: Float[Array, "*B C"],
    advantages: Float[Array, "*B"],
    mask: Bool[Array, "*B C"],
    clip_eps_low: float,
    clip_eps_high: float,
    clip_dual: float = 0.0,
) -> tuple[Float[Array, "*B C"], PolicyStats]:
    """Clipped loss on the sequence's importance ratio, the same value at each of its tokens.

        s = exp(clip(mean_t(policy_t - old_t), -20, 20)),   L as in `policy_loss` with rho = s

    Meant for the aggregation ``seq-mean-token-mean``, whose weights add the equal values up to one
    loss per sequence. The ratio is a geometric mean, so its clip range is narrow: 3e-4 and 4e-4 in
    the paper.

    Args:
        policy_logprobs: as in `policy_loss`, of whole sequences.
        old_logprobs: as there.
        advantages: one per sequence.
        mask: True for trained tokens. A sequence without any has ratio 1.
        clip_eps_low: as there.
        clip_eps_high: as there.
        clip_dual: as there; the paper has none.

    Returns:
        Loss per token (also at masked positions), and `PolicyStats`.

    Source: GSPO (arXiv 2507.18071) equation 5; verl, compute_policy_loss_gspo, whose token-level
    form with stopped gradients has the same gradient under the same aggregation. Not so where
    importance weights w_t come on top: here the sequence's gradient is multiplied by their mean,
    there the share of each token by its own w_t; the paper has none.
    """
    policy, old = _finite(mask, policy_logprobs), _finite(mask, old_logprobs)
    log_ratio = policy - jax.lax.stop_gradient(old)
    count = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / count  # [*B, 1]
    ratio = jnp.broadcast_to(jnp.exp(_clip_log_ratio(mean)), policy.shape)
    return _clipped_loss(ratio, advantages[..., None], clip_eps_low, clip_eps_high, clip_dual)


def _clipped_loss(
    ratio: Float[Array, "*B C"],
    advantages: Float[Array, "*B #C"],
    clip_eps_low: float,
    clip_eps_high: float,
    clip_dual: float,
) -> tuple[Float[Array, "*B C"], PolicyStats]:
    low, high = 1.0 - clip_eps_low, 1.0 + clip_eps_high
    is_negative = advantages < 0
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, low, high))
    is_dual = jnp.zeros(ratio.shape, bool)
    if clip_dual:
        ceiling = -advantages * clip_dual
        is_dual = is_negative & (loss > ceiling)
        loss = jnp.where(is_negative, jnp.minimum(ceiling, loss), loss)
    stats = PolicyStats(
        clip_low=is_negative & (ratio < low),
        clip_high=(advantages > 0) & (ratio > high),
        dual=is_dual,
        ratio=jax.lax.stop_gradient(ratio),
    )
    return loss, stats


def k3_kl(
    policy_logprobs: Float[Array, "*B C"],
    ref_logprobs: Float[Array, "*B C"],
    mask: Bool[Array, "*B C"] | None = None,
) -> Float[Array, "*B C"]:
    """Estimate of KL(policy || ref) per token: unbiased for on-policy tokens, and never negative.

        d = clip(ref - policy, -20, 20),   k3 = clip(exp(d) - d - 1, -10, 10)

    Computed as expm1(d) - d: near d = 0, where the values live, exp(d) - 1 loses float32's digits.
    Beyond either clip the gradient is 0.

    Args:
        policy_logprobs: of the parameters being trained, nats.
        ref_logprobs: of the reference (the policy with its adapter off), nats; a constant.
        mask: True for trained tokens; only needed if log-probs may not be finite elsewhere.

    Returns:
        KL per token in [0, 10] nats.

    Source: http://joschu.net/blog/kl-approx.html; verl, kl_penalty "low_var_kl".
    """
    policy, ref = _finite(mask, policy_logprobs), _finite(mask, ref_logprobs)
    difference = _clip_log_ratio(jax.lax.stop_gradient(ref) - policy)
    return jnp.clip(jnp.expm1(difference) - difference, -_MAX_KL, _MAX_KL)


def importance_weights(
    old_logprobs: Float[Array | np.ndarray, "*B C"],
    rollout_logprobs: Float[Array | np.ndarray, "*B C"],
    cap: float,
    mask: Bool[Array, "*B C"] | None = None,
) -> Float[Array, "*B C"]:
    """Truncated importance sampling: corrects for a sampler that is not quite the trainer.

        w = min(exp(clip(old - rollout, -20, 20)), cap)

    a constant factor on the loss of a token. It covers what differs between the two programs, and
    the parameters too if rollouts are a step old.

    Args:
        old_logprobs: the trainer's log-probs of the sampled tokens, nats.
        rollout_logprobs: the sampler's own, at the training temperature, nats.
        cap: upper bound, > 0; 2 is usual.
        mask: True for trained tokens; only needed if log-probs may not be finite elsewhere.

    Returns:
        Weights in (0, cap], gradient stopped.

    Source: https://fengyao.notion.site/off-policy-rl, TIS; verl, tis_imp_ratio_cap.
    """
    old = _finite(mask, jnp.asarray(old_logprobs))
    difference = old - _finite(mask, jnp.asarray(rollout_logprobs))
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(_clip_log_ratio(difference)), cap))


def sft_loss(policy_logprobs: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Cross-entropy per token, -log pi(token), nats, for supervised fine-tuning. Source: own."""
    return -policy_logprobs


def _clip_log_ratio(difference: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    return jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _finite(mask: Bool[Array, "*B C"] | None, logprobs: Float[Array, "*B C"]) -> Array:
    """Log-probs with 0 at masked positions, where no gradient flows either."""
    return logprobs if mask is None else jnp.where(mask, logprobs, 0.0)
