"""Rewards: from the judge's labels of a batch of groups to one number per rollout.

A batch of labels is one integer array `codes` [P, G]: a `Category` value 0..5, or one of the two
codes below, which are deliberately not rungs of the ladder. Everything here is a pure function of
that array (numpy, no jax, no files), so a reward can be tried in a notebook::

    codes = np.array([[4, 3, 0, FORMAT_FAILURE]])   # specific, less specific, wrong, no answer
    rewards("dynamic", codes)                        # [[1., 0., 0., -1.]]

A missing label is never scored: its reward reads 0 and `valid_mask` excludes it from the group's
mean and std, and from the loss and its denominator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from speciarl_jax.config.dotted import import_function
from speciarl_jax.config.schema import REWARDS
from speciarl_jax.types import Category, Failure, Rollout

FORMAT_FAILURE = -2  # no usable <answer>: reward -1, counts in mean and std, not in c_best
UNLABELLED = -1  # the judge failed: masked everywhere
NO_BAR = int(Category.MORE_SPECIFIC) + 1  # c* of a group without any label: nothing reaches it

_NOISE_STREAM = 0x6E6F6973  # names this use of (seed, step, prompt) among all others
_ROUNDING = 1e-9  # 0.28 * 25 is 7.000000000000001 in binary: shares are counted with this slack

# wrong, abstain, generic, less_specific, specific, more_specific
STATIC_REWARDS: dict[str, tuple[float, ...]] = {
    "binary": (0.0, 0.0, 0.0, 0.0, 1.0, 1.0),
    "scale1": (0.0, 0.25, 0.5, 0.75, 1.0, 1.0),
    "scale2": (0.0, 0.0, 0.5, 0.75, 1.0, 1.0),
    "scale3": (0.0, 0.0, 0.0, 0.75, 1.0, 1.0),
}


def category_codes(groups: Sequence[Sequence[Rollout]]) -> Int[np.ndarray, "P G"]:
    """Integer codes, int64, of judged groups in rollout order, which the ``single`` reward follows.

    A rollout without a prediction is a `FORMAT_FAILURE`, whatever its outcome; one that the judge
    failed to label is `UNLABELLED`; any other has the value of its category.

    Raises:
        ValueError: groups differ in size, or a rollout with a prediction has not been judged (a
            missing label would otherwise be scored silently).

    Source: own.
    """
    sizes = {len(group) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"groups of different sizes {sorted(sizes)}: expected one group size")
    shape = (len(groups), sizes.pop() if sizes else 0)
    codes = [_code(rollout) for group in groups for rollout in group]
    return np.array(codes, dtype=np.int64).reshape(shape)


def _code(rollout: Rollout) -> int:
    if rollout.prediction is None:
        return FORMAT_FAILURE
    if rollout.outcome is None:
        raise ValueError(
            f"rollout {rollout.prompt_id}#{rollout.sample_index} has a prediction but no outcome: "
            "wait for its Verdict or Failure before computing rewards"
        )
    return UNLABELLED if isinstance(rollout.outcome, Failure) else int(rollout.outcome.category)


def apply_label_noise(
    codes: Int[np.ndarray, "P G"],
    prob: float,
    seed: int,
    step: int,
    global_index: Int[np.ndarray, " P"],
) -> Int[np.ndarray, "P G"]:
    """Moves each label one rung up or down with probability `prob`.

    Both directions are equally likely; `wrong` can only rise and `specific` only fall.
    `more_specific` counts as `specific`: if it moves it becomes `less_specific`, and nothing ever
    rises above `specific`. Codes that are not labels stay. The draw of a rollout depends only on
    (seed, step, its prompt's global index, its place in the group), so neither batch splits nor
    resumption nor group size change it. The argument is not changed.

    Raises:
        ValueError: `prob` outside [0, 1], or a negative seed, step or index.

    Source: released code, apply_classification_noise; seeded here, unseeded there.
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"label noise {prob}: expected a probability between 0 and 1")
    if min(seed, step, *np.asarray(global_index).tolist()) < 0:
        raise ValueError(f"label noise: seed {seed}, step {step} and every index must be >= 0")
    draws = np.empty((*codes.shape, 2))  # [P, G, 2]: does it move, and which way
    for row, index in enumerate(np.asarray(global_index).tolist()):
        key = np.random.SeedSequence([_NOISE_STREAM, seed, step, index])
        draws[row] = np.random.Generator(np.random.Philox(key)).random((codes.shape[1], 2))
    rung = np.minimum(codes, int(Category.SPECIFIC))
    direction = np.where(draws[..., 1] < 0.5, -1, 1)
    direction = np.where(rung == int(Category.WRONG), 1, direction)
    direction = np.where(rung == int(Category.SPECIFIC), -1, direction)
    moves = (draws[..., 0] < prob) & (codes >= 0)
    return np.where(moves, rung + direction, codes).astype(np.int64)


def bar(codes: Int[np.ndarray, "*P G"], bar_support: float = 1.0) -> Int[np.ndarray, "*P"]:
    """c*, the category an answer must reach to earn the dynamic reward, per group.

        c_best = max { c : at least m answers have category >= c }
        c*     = specific if c_best = more_specific; abstain if c_best = wrong; else c_best

    With m = 1, the paper, c_best is the best label of the group. A larger m keeps one lucky guess
    on an image that cannot be told from raising the bar for its siblings. If fewer than m answers
    carry a label, c* is abstain, as it would be had the others been wrong.

    Args:
        codes: one group [G] or groups [P, G]. Format failures count among the N answers but reach
            nothing; unlabelled answers are not there at all.
        bar_support: m. A whole number >= 1 of answers, or, below 1, a share of the group's N
            answers without the unlabelled ones, rounded up: .3 of 10 is 3, .3 of 9 is 3.

    Returns:
        int64 c* in abstain..specific, or `NO_BAR` for a group without any label.

    Raises:
        ValueError: `bar_support` is not positive, or above 1 and not whole.

    Source: SpeciaRL (arXiv 2603.03197), dynamic reward; support m is our own extension.
    """
    if not bar_support > 0 or (bar_support > 1 and bar_support % 1 != 0):
        raise ValueError(
            f"bar_support={bar_support}: set a whole number of answers, or a share between 0 and 1"
        )
    num_answers = np.sum(codes != UNLABELLED, axis=-1)
    needed: float | np.ndarray = bar_support
    if bar_support < 1:
        needed = np.maximum(np.ceil(bar_support * num_answers - _ROUNDING), 1)
    best = np.full(codes.shape[:-1], int(Category.WRONG), dtype=np.int64)
    for category in range(int(Category.ABSTAIN), int(Category.MORE_SPECIFIC) + 1):
        best = np.where(np.sum(codes >= category, axis=-1) >= needed, category, best)
    best = np.clip(best, int(Category.ABSTAIN), int(Category.SPECIFIC))
    return np.where(np.any(codes >= 0, axis=-1), best, NO_BAR)


def rewards(
    name: str, codes: Int[np.ndarray, "P G"], bar_support: float = 1.0
) -> Float[np.ndarray, "P G"]:
    """Reward of every rollout.

    ============  =======================================================================
    ``dynamic``   1 if category >= c* (see `bar`), else 0: the paper's reward
    ``single``    1 for the first answer in rollout order that reaches c*, else 0
    ``binary``    1 for specific and more_specific, else 0: the verifiable reward, "RFT"
    ``scale1..3`` a fixed value per category, see `STATIC_REWARDS`
    dotted path   a user's ``function(codes) -> rewards``, both [P, G]
    ============  =======================================================================

    A format failure earns -1 in all of them except a user's own, which decides for itself.

    Only ``dynamic`` and ``single`` have a bar, whose m is `bar_support`.

    Returns:
        float64 rewards; 0 where unlabelled, a placeholder that `valid_mask` excludes.

    Raises:
        ValueError: unknown name, a path that leads nowhere, or a user's function that returns
            another shape or a value that is not finite.

    Source: SpeciaRL (arXiv 2603.03197); ``single`` as the released code's REWARD_MODE=single, where
    specific and more_specific tie, so that the first of either wins.
    """
    if "." in name:
        values = _user_rewards(name, codes)
    else:
        values = np.where(codes == FORMAT_FAILURE, -1.0, _named_rewards(name, codes, bar_support))
    return np.where(codes == UNLABELLED, 0.0, values)


def _named_rewards(
    name: str, codes: Int[np.ndarray, "P G"], bar_support: float
) -> Float[np.ndarray, "P G"]:
    if name in STATIC_REWARDS:
        fixed: np.ndarray = np.asarray(STATIC_REWARDS[name])[np.maximum(codes, 0)]
        return fixed
    if name not in ("dynamic", "single"):
        raise ValueError(f"reward {name!r}: expected one of {', '.join(REWARDS)}, or a dotted path")
    reached = codes >= bar(codes, bar_support)[..., None]  # [P, G]
    if name == "single":
        reached &= np.cumsum(reached, axis=-1) == 1
    return reached.astype(np.float64)


def _user_rewards(path: str, codes: Int[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    values = np.asarray(import_function(path, "reward")(codes.copy()), dtype=np.float64)
    if values.shape != codes.shape:
        raise ValueError(f"reward {path}: returned shape {values.shape}, expected {codes.shape}")
    if not np.all(np.isfinite(values[codes != UNLABELLED])):
        raise ValueError(f"reward {path}: returned a value that is not finite")
    return values


def overlong_penalty(
    lengths: Int[np.ndarray, "P G"], max_tokens: int, buffer_tokens: int
) -> Float[np.ndarray, "P G"]:
    """DAPO's soft penalty for long completions, to be added to the reward.

    0 up to max - buffer tokens, then linear down to -1 at max:
    ``clip((max - buffer - length) / buffer, -1, 0)``.

    Args:
        lengths: completion length, tokens, stop token included.
        max_tokens: length limit of a completion, tokens.
        buffer_tokens: length of the linear part, tokens; 0 for no penalty.

    Returns:
        Penalties in [-1, 0].

    Raises:
        ValueError: `buffer_tokens` outside [0, `max_tokens`].

    Source: DAPO (arXiv 2503.14476) equation 13; verl, DAPORewardManager.
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"overlong buffer of {buffer_tokens} tokens: set it between 0 and the completion "
            f"limit of {max_tokens} tokens"
        )
    if buffer_tokens == 0:
        return np.zeros(lengths.shape)
    return np.clip((max_tokens - buffer_tokens - lengths) / buffer_tokens, -1.0, 0.0)


def dropped_groups(codes: Int[np.ndarray, "P G"], quorum_frac: float) -> Bool[np.ndarray, " P"]:
    """Groups with too few labels to rank their answers: failed > floor(quorum_frac * G).

    Raises:
        ValueError: `quorum_frac` outside [0, 1].

    Source: own; the released code scores a missing label 0.
    """
    if not 0 <= quorum_frac <= 1:
        raise ValueError(f"failed_quorum_frac={quorum_frac}: set it between 0 and 1")
    allowed = math.floor(quorum_frac * codes.shape[1] + _ROUNDING)
    is_dropped: np.ndarray = np.sum(codes == UNLABELLED, axis=1) > allowed
    return is_dropped


def valid_mask(codes: Int[np.ndarray, "P G"], quorum_frac: float) -> Bool[np.ndarray, "P G"]:
    """Rollouts that may teach: not those unlabelled, nor any of `dropped_groups`. Source: own.

    Format failures are valid, they earn -1.
    """
    is_kept: np.ndarray = ~dropped_groups(codes, quorum_frac)
    is_valid: np.ndarray = (codes != UNLABELLED) & is_kept[:, None]
    return is_valid
