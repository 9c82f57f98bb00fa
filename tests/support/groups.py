"""Random groups of answers to the field guide's prompts, as the learner gets them."""

import numpy as np

from speciarl_jax.learner import batches
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch
from speciarl_jax.types import Rollout
from tests.support.tiny_policy import small_batch, states

GROUP = 3


def random_groups(session, num_prompts, seed=0):
    rng = np.random.default_rng(seed)
    allowed = np.flatnonzero(~session.vocabulary.banned)
    groups = []
    for p in range(num_prompts):
        group = []
        for g in range(GROUP):
            tokens = rng.choice(allowed, rng.integers(1, 17)).astype(np.int32)
            logprobs = -rng.random(len(tokens)).astype(np.float32) - 3
            group.append(Rollout(f"p{p}", "d", "t", g, tokens, logprobs, "", None, False))
        groups.append(group)
    return groups


def make_batch(session, num_prompts=4, seed=0):
    """(prompts, completions, the two with random weights, advantages and references)."""
    rng = np.random.default_rng(seed)
    batch = small_batch(session, num_prompts)
    completions = batches.pad_completions(random_groups(session, num_prompts, seed), 16)
    width = completions.completion_tokens.shape[2]
    is_token = np.arange(width) < completions.lengths[..., None]
    weights = np.where(is_token, rng.random(is_token.shape), 0).astype(np.float32)
    advantages = rng.normal(size=completions.lengths.shape).astype(np.float32)
    embeds = session.encode(states(session), batch)
    old = completions.rollout_logprobs
    train = TrainBatch(
        tree=batches.make_tree(batch, completions, embeds),
        weights=weights,
        advantages=advantages,
        old_logprobs=old,
        ref_logprobs=old - 0.1,
    )
    return batch, completions, train


def settings(**changes):
    return LossConfig(kl_coef=0.05, entropy_coef=0.01, temperature=0.8, **changes)
