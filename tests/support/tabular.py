"""A world small enough for its expected gradient: one picture, a softmax over three answers.

    specific   right with probability q (the hit rate), else wrong
    generic    always right
    abstain    always right, and says nothing

Rewards, advantages and loss are the package's own; only the policy and the world are tables. A
group of N answers is, but for order, a count of four outcomes, so its expectation is a finite sum.

    python -m tests.support.tabular --out=docs/images/closed_form.svg
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from speciarl_jax.objective import advantage, reward
from speciarl_jax.objective.loss import policy_loss
from speciarl_jax.types import Category

ACTIONS = ("specific", "generic", "abstain")
# wrong guess, right guess, generic, abstain: what was said, and what the judge says of it
OUTCOME_ACTIONS = np.array([0, 0, 1, 2])
OUTCOME_CODES = np.array(
    [Category.WRONG, Category.SPECIFIC, Category.GENERIC, Category.ABSTAIN], np.int64
)


def outcome_probs(policy, hit_rate):
    """[4] chances of an answer of a policy [3]."""
    specific, generic, abstain = policy
    return np.array([specific * (1 - hit_rate), specific * hit_rate, generic, abstain])


@functools.cache
def compositions(group_size, kinds=4):
    """[K, kinds] all ways to spread N answers over the first outcomes, 0 for the others."""
    ends = np.array(list(_partitions(group_size, kinds)))
    return np.pad(ends, ((0, 0), (0, 4 - kinds)))


def _partitions(total, kinds):
    if kinds == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _partitions(total - first, kinds - 1):
            yield (first, *rest)


def multinomial(counts, probs):
    """Probability of each row of counts [K, 4]."""
    total = math.lgamma(counts[0].sum() + 1)
    ways = np.array([total - sum(math.lgamma(n + 1) for n in row) for row in counts.tolist()])
    return np.exp(ways) * np.prod(np.power(probs, counts), axis=1)


def credit(outcomes, algo, support):
    """[K, N] advantages of groups of outcomes, by the package."""
    rewards = reward.rewards("dynamic", OUTCOME_CODES[outcomes], support)
    return advantage.resolve(algo)(rewards, np.ones(outcomes.shape, bool))


@jax.jit
def descent(logits, actions, advantages, weights):
    """[3] minus the gradient of: sum over groups [K, N] of weight times their mean loss."""

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)[actions][..., None]  # [K, N, 1]
        old = jax.lax.stop_gradient(logprobs)
        per_token, _ = policy_loss(logprobs, old, advantages, 0.2, 0.2, 3.0)
        return jnp.sum(weights * jnp.mean(per_token[..., 0], axis=1))

    return -jax.grad(loss)(logits)


def exact_gradient(logits, hit_rate, group_size, algo="grpo", support=1):
    """[3] direction of descent on the expected loss, float64: every group, with its chance."""
    counts = compositions(group_size)
    outcomes = np.array([np.repeat(np.arange(4), row) for row in counts])
    policy = np.exp(logits - np.max(logits))
    chance = multinomial(counts, outcome_probs(policy / policy.sum(), hit_rate))
    advantages = credit(outcomes, algo, support)
    with jax.enable_x64(True):
        return np.asarray(descent(logits, OUTCOME_ACTIONS[outcomes], advantages, chance))


def sampled_gradients(rng, blocks, logits, hit_rate, group_size, algo="grpo", support=1):
    """[blocks, 3] the same from 100 sampled groups each."""
    policy = np.exp(logits) / np.exp(logits).sum()
    probs = outcome_probs(policy, hit_rate)
    outcomes = rng.choice(4, size=(blocks, 100, group_size), p=probs)
    advantages = credit(outcomes.reshape(-1, group_size), algo, support).reshape(outcomes.shape)
    actions, weights = OUTCOME_ACTIONS[outcomes], np.full(100, 0.01)
    with jax.enable_x64(True):
        blocks = [
            descent(logits, *block, weights) for block in zip(actions, advantages, strict=True)
        ]
        return np.stack(blocks)


# --- two answers: guess or generic -----------------------------------------------------------


@functools.cache
def _sums(group_size, algo, support):
    """Compositions of wrong, right and generic; advantages of guesses and of the rest, per N."""
    counts = compositions(group_size, 3)
    outcomes = np.array([np.repeat(np.arange(4), row) for row in counts])
    advantages = credit(outcomes, algo, support)
    is_guess = outcomes < 2
    parts = [np.where(side, advantages, 0).mean(1) for side in (is_guess, ~is_guess)]
    return counts, *parts


def drift(specific, hit_rate, group_size, algo="grpo", support=1):
    """Expected advantage of a guess minus that of the generic name, if P(specific) = `specific`.

    The gradient of P(specific)'s logit against the other's is p (1 - p) times this.
    """
    counts, of_guess, of_generic = _sums(group_size, algo, support)
    chance = multinomial(counts, outcome_probs((specific, 1 - specific, 0.0), hit_rate))
    return (chance @ of_guess) / specific - (chance @ of_generic) / (1 - specific)


def threshold(hit_rate, group_size, algo="grpo", support=1):
    """P(specific) above which the policy moves to guessing; 0 if always, 1 if never."""
    low, high = 1e-6, 1 - 1e-6
    settings = (hit_rate, group_size, algo, support)
    if drift(low, *settings) > 0:
        return 0.0
    if drift(high, *settings) < 0:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if drift(middle, *settings) > 0 else (middle, high)
    return low


def break_even(hit_rate, group_size):
    """Where a guess earns what the generic name earns: q = (1 - p q)^(N - 1)."""
    return (1 - hit_rate ** (1 / (group_size - 1))) / hit_rate


def centred_threshold(hit_rate, group_size):
    """Where the centred advantages are equal: q = (1 - q) (1 - p q)^(N - 2)."""
    odds = hit_rate / (1 - hit_rate)
    return (1 - odds ** (1 / (group_size - 2))) / hit_rate


def train(specific, hit_rate, group_size, algo="grpo", support=1, steps=4000, rate=1.0):
    """P(specific) after `steps` of the expected gradient."""
    logit = math.log(specific / (1 - specific))
    for _ in range(steps):
        p = 1 / (1 + math.exp(-logit))
        if not 1e-3 < p < 1 - 1e-3:
            break
        logit += rate * p * (1 - p) * drift(p, hit_rate, group_size, algo, support)
    return 1 / (1 + math.exp(-logit))


def draw(path, points=91):
    """The figure of docs/closed_form.md."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "closed form", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    rates = np.linspace(0.08, 0.98, points)
    for size, colour in ((5, "#7a9cc6"), (10, "#3a6ea5"), (15, "#12355b")):
        left.plot(rates, [threshold(q, size) for q in rates], color=colour, label=f"N = {size}")
        earned = np.clip([break_even(q, size) for q in rates], 0, 1)
        left.plot(rates, earned, color=colour, linestyle=":", linewidth=1)
    left.set_title("the paper's bar, m = 1 (dotted: equal reward)")
    for support, label, style in ((1, "m = 1", "-"), (2, "m = 2", "--"), (0.3, "m = .3 N", "-.")):
        limits = [threshold(q, 15, support=support) for q in rates]
        right.plot(rates, limits, color="#12355b", linestyle=style, label=label)
    right.set_title("bar by support, N = 15")
    left.set_ylabel("P(specific) above which it learns to guess")
    for axis in (left, right):
        axis.set(xlabel="hit rate q of a guess", xlim=(0, 1), ylim=(-0.02, 1.04))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="draws the thresholds of docs/closed_form.md")
    parser.add_argument("--out", required=True, help="SVG to write")
    draw(parser.parse_args().out)
