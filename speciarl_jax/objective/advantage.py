"""Advantages: how much better a rollout was than its group. Pure numpy, float64, no jax.

Every function takes finite `rewards` and `valid`, both [P, G], and gives [P, G]; rollouts that are
not valid (see `reward.valid_mask`) leave mean, std and count, and get advantage 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from speciarl_jax.config.dotted import import_function

AdvantageFn = Callable[
    [Float[np.ndarray, "P G"], Bool[np.ndarray, "P G"]], Float[np.ndarray, "P G"]
]


def group_advantages(
    rewards: Float[np.ndarray, "P G"],
    valid: Bool[np.ndarray, "P G"],
    norm_by_std: bool,
    eps: float = 1e-6,
) -> Float[np.ndarray, "P G"]:
    """Group-relative advantage of GRPO, or of Dr.GRPO without the division.

        A_i = (r_i - mean(r)) / (std(r) + eps)

    over the valid rollouts of the group, std with ddof=1. A group with a single valid rollout has
    mean 0 and std 1, so its advantage is (nearly) its reward. Where all valid rewards are equal
    the advantage is exactly 0: rounding must not pick a direction.

    Args:
        rewards: ignored where not valid.
        valid: True for rollouts that take part.
        norm_by_std: False for Dr.GRPO: A_i = r_i - mean(r).
        eps: in units of reward.

    Source: GRPO (arXiv 2402.03300) section 4.1.2, Dr.GRPO (arXiv 2503.20783);
    verl, compute_grpo_outcome_advantage.
    """
    count, centred = _centre(rewards, valid)
    if not norm_by_std:
        return centred
    variance = np.sum(np.square(centred), axis=1, keepdims=True) / np.maximum(count - 1, 1)
    std = np.where(count > 1, np.sqrt(variance), 1.0)
    return centred / (std + eps)


def rloo_advantages(
    rewards: Float[np.ndarray, "P G"], valid: Bool[np.ndarray, "P G"]
) -> Float[np.ndarray, "P G"]:
    """Leave-one-out advantage of RLOO.

        A_i = r_i - mean_{j != i}(r_j) = n / (n - 1) (r_i - mean(r))

    over the n valid rollouts of the group. With one valid rollout there is no other to compare
    with, and its advantage is its reward.

    Source: RLOO (arXiv 2402.14740) equation 8; verl, compute_rloo_outcome_advantage.
    """
    count, centred = _centre(rewards, valid)
    return np.asarray(centred * (count / np.maximum(count - 1, 1)))


def _centre(
    rewards: Float[np.ndarray, "P G"], valid: Bool[np.ndarray, "P G"]
) -> tuple[Float[np.ndarray, "P 1"], Float[np.ndarray, "P G"]]:
    """Valid rollouts per group, and rewards minus their mean (0 for a group of one)."""
    values = np.where(valid, rewards.astype(np.float64), 0.0)
    count = np.sum(valid, axis=1, keepdims=True).astype(np.float64)
    mean = np.sum(values, axis=1, keepdims=True) / np.maximum(count, 1)
    centred = values - np.where(count > 1, mean, 0.0)
    is_flat = (count > 1) & ~has_spread(rewards, valid)[:, None]
    return count, np.where(valid & ~is_flat, centred, 0.0)


def has_spread(
    rewards: Float[np.ndarray, "P G"], valid: Bool[np.ndarray, "P G"]
) -> Bool[np.ndarray, " P"]:
    """True for groups whose valid rewards, two at least, are not all equal: those that can teach.

    Dynamic sampling keeps these (on the raw reward, before the overlong penalty), and
    group/zero_std_frac counts the others.

    Source: DAPO (arXiv 2503.14476) section 3.2.
    """
    high = np.max(np.where(valid, rewards, -np.inf), axis=1, initial=-np.inf)
    low = np.min(np.where(valid, rewards, np.inf), axis=1, initial=np.inf)
    is_spread: np.ndarray = high > low
    return is_spread


def resolve(name: str, norm_by_std: bool = True) -> AdvantageFn:
    """The advantage function of an objective, as ``function(rewards, valid)``.

    Args:
        name: ``grpo``, ``dapo`` or ``gspo`` (group-relative); ``dr_grpo`` (the same, never divided
            by the std, whatever `norm_by_std`); ``rloo``; or the dotted path of a user's
            ``function(rewards, valid) -> advantages``.
        norm_by_std: whether the group-relative ones divide by the std; not used by the others.

    Raises:
        ValueError: a name without an advantage (``sft`` has none), or a path that leads nowhere;
            when called, a user's function that returns another shape or a value not finite.

    Source: own.
    """
    if "." in name:
        return functools.partial(_user_advantages, import_function(name, "advantage"), name)
    if name == "rloo":
        return rloo_advantages
    if name in ("grpo", "dapo", "gspo", "dr_grpo"):
        is_normed = norm_by_std and name != "dr_grpo"
        return functools.partial(group_advantages, norm_by_std=is_normed)
    raise ValueError(
        f"advantage {name!r}: expected grpo, dr_grpo, dapo, gspo, rloo or a dotted path"
    )


def _user_advantages(
    function: AdvantageFn,
    name: str,
    rewards: Float[np.ndarray, "P G"],
    valid: Bool[np.ndarray, "P G"],
) -> Float[np.ndarray, "P G"]:
    values = np.asarray(function(rewards.copy(), valid.copy()), dtype=np.float64)
    if values.shape != rewards.shape:
        raise ValueError(f"advantage {name}: got shape {values.shape}, expected {rewards.shape}")
    if not np.all(np.isfinite(values[valid])):
        raise ValueError(f"advantage {name}: returned a value that is not finite")
    return np.where(valid, values, 0.0)
