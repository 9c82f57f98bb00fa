"""Faults that a trainer can have without anything looking wrong, each with the number it changes.

What acts on parameters (gradient clipping, weight decay, betas, warm-up, temperature, importance
weights, the sign of advantages) is held by `tests/learner/test_trajectory.py` as well; here is what
one algorithm has and another has not, by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.algorithm import learn
from speciarl_jax.algorithm.credit import check_failed_budget, give_credit
from speciarl_jax.config.recipes import set_algorithm
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.learner.batches import Completions
from speciarl_jax.learner.logprobs import LossConfig
from speciarl_jax.learner.update import batch_loss
from speciarl_jax.objective.reward import FORMAT_FAILURE, UNLABELLED
from speciarl_jax.rollout.sampling import training_sampling
from speciarl_jax.types import Category, Rollout, Verdict
from tests.support.groups import make_batch
from tests.support.tiny_policy import jolt, open_small_session, small_config, states

WRONG, GENERIC, SPECIFIC = Category.WRONG, Category.GENERIC, Category.SPECIFIC


def algorithm(name, **changes):
    config = small_config(**changes)
    set_algorithm(config, name)
    return config


def credit_of(config, categories, lengths):
    """Credit of one group; None is an answer without a prediction."""
    group = [
        Rollout(
            "p", "d", "t", g, np.zeros(length, np.int32), np.zeros(length, np.float32), "",
            prediction=None if category is None else "bird", is_truncated=False,
            outcome=None if category is None else Verdict(category, "test"),
        )
        for g, (category, length) in enumerate(zip(categories, lengths, strict=True))
    ]  # fmt: skip
    return give_credit(config, [group], np.array([lengths]), np.zeros(1, np.int64), step=1)


def test_answers_below_the_mean_are_pushed_down():
    """Rewards 1 0 0 -1: mean 0, std sqrt(2/3)."""
    credit = credit_of(algorithm("grpo"), [SPECIFIC, WRONG, GENERIC, None], [4, 4, 4, 4])
    assert credit.codes.tolist() == [[4, 0, 2, FORMAT_FAILURE]]
    assert credit.rewards.tolist() == [[1, 0, 0, -1]]
    np.testing.assert_allclose(credit.advantages, np.array([[1, 0, 0, -1]]) * 1.5**0.5, rtol=2e-6)


def test_dapo_takes_from_answers_in_the_last_quarter():
    """The last 4 of 16 tokens: 12 cost nothing, 13 a quarter, 16 all of it."""
    labels, lengths = [SPECIFIC, SPECIFIC, SPECIFIC, WRONG], [12, 13, 16, 14]
    credit = credit_of(algorithm("dapo"), labels, lengths)
    assert credit.rewards.tolist() == [[1, 0.75, 0, -0.5]]
    assert credit_of(algorithm("grpo"), labels, lengths).rewards.tolist() == [[1, 1, 1, 0]]


def test_label_noise_moves_labels_before_they_are_rewarded():
    """At probability 1 specific can only fall and wrong only rise, so the values are known."""
    config = small_config(algo__reward="scale1", algo__label_noise=1.0)
    credit = credit_of(config, [SPECIFIC, WRONG, WRONG, SPECIFIC], [4, 4, 4, 4])
    assert credit.codes.tolist() == [[3, 1, 1, 3]]
    assert credit.rewards.tolist() == [[0.75, 0.25, 0.25, 0.75]]
    config.algo.label_noise = 0.0
    assert credit_of(config, [SPECIFIC, WRONG], [4, 4]).rewards.tolist() == [[1, 0]]


def test_divisors_by_algorithm():
    """Two mini-batches of two answers; the last answer of the second has no label. C is 4, L 8.

    Dr.GRPO divides by sequences and the configured length, whatever the padding and their own
    lengths; GRPO and DAPO by the tokens of the mini-batch; GSPO by sequences and their own lengths.
    """
    lengths = np.array([[1, 3], [2, 4]])
    padded = Completions(np.zeros((2, 2, 4), np.int32), lengths, np.zeros((2, 2, 4), np.float32))
    valid = np.array([[True, True], [True, False]])
    expected = {
        "dr_grpo": [[1 / 16, 1 / 16], [1 / 8, 0]],
        "grpo": [[1 / 4, 1 / 4], [1 / 2, 0]],
        "dapo": [[1 / 4, 1 / 4], [1 / 2, 0]],
        "gspo": [[1 / 2, 1 / 6], [1 / 2, 0]],
    }
    for name, rows in expected.items():
        config = algorithm(
            name,
            rollout__max_completion_tokens=8,
            train__prompts_per_step=2,
            train__prompts_per_update=1,
        )
        is_token = np.arange(4) < lengths[..., None]
        wanted = np.where(is_token, np.array(rows)[..., None], 0)
        np.testing.assert_allclose(learn.step_weights(config, padded, valid), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "is_needed"),
    [
        ({"train__prompts_per_update": 2}, True),  # the second update has moved away
        ({"train__prompts_per_update": 4}, False),  # its own log-probs are the old ones
        ({"train__prompts_per_update": 2, "algo__old_logprobs": "rollout"}, False),
        ({"train__prompts_per_update": 4, "algo__importance_cap": 2.0}, True),
    ],
)
def test_old_logprobs_are_taken_before_a_second_update(changes, is_needed):
    assert small_config(train__prompts_per_step=4, **changes).needs_old_logprobs is is_needed


def test_sampler_and_trainer_share_a_temperature():
    config = small_config(rollout__temperature=0.8)
    assert training_sampling(config).temperature == 0.8
    assert LossConfig.of(config, None).temperature == 0.8


def test_gspo_has_one_ratio_a_sequence():
    """Half of the tokens are likelier by .5 nats, the other rarer: PPO clips each, GSPO none."""
    config = algorithm("gspo", train__prompts_per_step=2, train__prompts_per_update=2)
    config.algo.clip_eps_low, config.algo.clip_eps_high = 0.2, 0.3
    session = jolt(open_small_session(), scale=0.15)
    _, completions, train = make_batch(session, num_prompts=2)
    valid = np.ones(completions.lengths.shape, bool)
    weights = learn.step_weights(config, completions, valid)
    policy = nnx.merge(session.parts.graphdef, *states(session))
    banned = jnp.asarray(session.vocabulary.banned)

    @nnx.jit
    def run(policy, train):
        loss, stats = batch_loss(policy, train, banned, LossConfig.of(config, None))
        return loss, stats["logprobs"]

    train = dataclasses.replace(train, weights=weights)
    logprobs = run(policy, jax.tree.map(jnp.asarray, train))[1]
    shift = np.where(np.arange(weights.shape[2]) % 2, 0.5, -0.5).astype(np.float32)
    train = dataclasses.replace(train, old_logprobs=logprobs + shift[None, None])
    loss = run(policy, jax.tree.map(jnp.asarray, train))[0]
    mean = np.sum((weights > 0) * -shift[None, None], axis=-1) / completions.lengths
    ratio, advantage = np.exp(mean.astype(np.float64)), train.advantages.astype(np.float64)
    per_answer = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.3))
    np.testing.assert_allclose(loss, per_answer.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        # labels missing of each of six groups of ten; two may be, by the quorum of .2
        ([2, 2, 2, 2, 2, 2], None),
        ([3, 3, 3, 2, 2, 2], None),  # half of the groups is as much as the budget allows
        ([3, 3, 3, 3, 2, 2], "67% of the groups are dropped, as more than .*=0.2 .* missing .27% "),
        ([4, 4, 4, 4, 4, 4], "100% of the groups are dropped"),
        ([9, 9, 9, 9, 0, 0], "60% of the labels are missing; .* allows 50%"),
    ],
)
def test_a_step_with_too_few_labels_to_learn_from_is_refused(missing, message):
    """At 40 % failures five of six groups are gone while most labels are there."""
    codes = np.array([[UNLABELLED] * m + [4] * (10 - m) for m in missing])
    check = functools.partial(check_failed_budget, small_config(), [codes[:2], codes[2:]], 7)
    if message is None:
        check()
        return
    with pytest.raises(TrainingStopped, match=f"step 7: {message}"):
        check()
