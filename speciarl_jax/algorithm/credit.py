"""From judged groups to rewards and advantages: the host's half of a step. Numpy, no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from speciarl_jax.config.schema import Config
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.objective import advantage, reward
from speciarl_jax.rollout.groups import Groups


@dataclasses.dataclass
class Credit:
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


def give_credit(
    config: Config, groups: Groups, lengths: np.ndarray, global_index: np.ndarray, step: int
) -> Credit:
    """Rewards and advantages of judged groups; writes both into the rollouts.

    Args:
        config: the recipe.
        groups: P groups with their outcomes.
        lengths: [P, G] completion tokens, for the overlong penalty.
        global_index: [P] of the prompts; label noise is drawn by it.
        step: of the run.
    """
    algo = config.algo
    codes = label_codes(config, groups, global_index, step)
    values, valid = raw_rewards(config, codes)
    limit = config.rollout.max_completion_tokens
    shaped = values + reward.overlong_penalty(lengths, limit, algo.overlong_buffer_tokens)
    advantages = advantage.resolve(algo.name, algo.norm_by_std)(shaped, valid)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            rollout.reward = float(shaped[p, g])
            rollout.advantage = float(advantages[p, g])
    return Credit(codes, shaped, valid, advantages)


def label_codes(
    config: Config, groups: Groups, global_index: np.ndarray, step: int
) -> Int[np.ndarray, "P G"]:
    """Categories and failures of judged groups, with the recipe's label noise."""
    codes = reward.category_codes(groups)
    if config.algo.label_noise:
        index = global_index[: len(groups)]
        codes = reward.apply_label_noise(codes, config.algo.label_noise, config.seed, step, index)
    return codes


def raw_rewards(
    config: Config, codes: Int[np.ndarray, "P G"]
) -> tuple[Float[np.ndarray, "P G"], Bool[np.ndarray, "P G"]]:
    """Rewards before any penalty on length, and which rollouts take part."""
    algo = config.algo
    values = reward.rewards(algo.reward, codes, algo.bar_support)
    return values, reward.valid_mask(codes, algo.failed_quorum_frac)


def has_lesson(config: Config, codes: Int[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Groups that dynamic sampling keeps: enough labels, and raw rewards that are not all equal.

    The reward without the overlong penalty decides, as a difference in length alone teaches no
    better answer.

    Source: DAPO (arXiv 2503.14476) section 3.2; verl's filter_groups on the metric ``acc``.
    """
    return advantage.has_spread(*raw_rewards(config, codes))


def check_failed_budget(config: Config, codes: Sequence[np.ndarray], step: int) -> None:
    """Refuses to go on without labels.

    A few missing labels in each group can drop most groups long before they are most labels: at
    40 % failures five of six groups of ten are below the quorum. So both are counted.

    Args:
        config: the recipe.
        codes: of all groups sampled for this step so far, by all processes, [P, G] each.
        step: of the run.

    Raises:
        TrainingStopped: a larger share of labels is missing, or of groups dropped for them, than
            ``algo.failed_budget_frac`` allows.
    """
    algo, everything = config.algo, np.concatenate(codes)
    failed = float(np.mean(everything == reward.UNLABELLED))
    dropped = float(np.mean(reward.dropped_groups(everything, algo.failed_quorum_frac)))
    if max(failed, dropped) <= algo.failed_budget_frac:
        return
    what = f"{failed:.0%} of the labels are missing"
    if failed <= algo.failed_budget_frac:
        what = (
            f"{dropped:.0%} of the groups are dropped, as more than algo.failed_quorum_frac="
            f"{algo.failed_quorum_frac:g} of their labels are missing ({failed:.0%} of all)"
        )
    raise TrainingStopped(
        f"step {step}: {what}; algo.failed_budget_frac allows {algo.failed_budget_frac:.0%}; look "
        "at the judge's log, then --resume"
    )
