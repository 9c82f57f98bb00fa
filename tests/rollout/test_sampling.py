"""Token choice: every option's frequencies against exact probabilities, and its edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.policy.vocabulary import NEG_INF, allowed_logits
from speciarl_jax.rollout.sampling import Sampling, sample_tokens

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 4.0, 0.2], np.float32)
BANNED = np.array([0, 0, 0, 0, 0, 0, 1, 0], bool)


def exact_probs(sampling: Sampling, seen=()) -> np.ndarray:
    """The truncated distribution, worked out with sorting in float64."""
    logits = np.where(BANNED, -np.inf, LOGITS.astype(np.float64) / sampling.temperature)
    for token in seen:
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    keep = [i for i in order if np.isfinite(logits[i])]
    if sampling.top_k:
        keep = keep[: sampling.top_k]
    weights = {i: np.exp(logits[i]) for i in keep}
    if sampling.top_p < 1:
        total, mass, kept = sum(weights.values()), 0.0, []
        for i in keep:
            if mass / total >= sampling.top_p:
                break
            kept.append(i)
            mass += weights[i]
        weights = {i: weights[i] for i in kept}
    if sampling.min_p:
        peak = max(weights.values())
        weights = {i: w for i, w in weights.items() if w >= sampling.min_p * peak}
    probs = np.zeros(len(logits))
    for i, w in weights.items():
        probs[i] = w / sum(weights.values())
    return probs


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=0.6, top_p=0.95, top_k=5, min_p=0.01),
        Sampling(repetition_penalty=1.5),
    ],
    ids=str,
)
def test_frequencies_match_exact_probabilities(sampling):
    draws = 40_000
    logits = np.asarray(
        allowed_logits(jnp.asarray(LOGITS), jnp.asarray(BANNED), sampling.temperature)
    )
    seen_tokens = (0, 4) if sampling.repetition_penalty != 1 else ()
    seen = np.zeros((draws, len(LOGITS)), bool)
    seen[:, list(seen_tokens)] = True
    uniforms = jax.random.uniform(jax.random.key(3), (draws,))
    tokens, _ = sample_tokens(
        jnp.broadcast_to(logits, (draws, len(logits))), uniforms, sampling, jnp.asarray(seen)
    )
    counts = np.bincount(np.asarray(tokens), minlength=len(LOGITS))
    probs = exact_probs(sampling, seen_tokens)
    assert counts[probs == 0].sum() == 0
    expected = draws * probs[probs > 0]
    chi_square = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    # 99.9 % quantile of chi-square with at most 6 degrees of freedom; the seed is fixed.
    assert chi_square < 22.5


def test_logprob_is_before_truncation():
    logits = allowed_logits(jnp.asarray(LOGITS[None]), jnp.asarray(BANNED), 1.0)
    token, logprob = sample_tokens(logits, jnp.array([0.99]), Sampling(top_k=1))
    weights = np.exp(np.where(BANNED, -np.inf, LOGITS.astype(np.float64)))
    assert int(token[0]) == 0
    np.testing.assert_allclose(float(logprob[0]), np.log(weights[0] / weights.sum()), rtol=1e-6)


def test_greedy_takes_the_best_allowed_token():
    token, _ = sample_tokens(
        allowed_logits(jnp.asarray(LOGITS[None]), jnp.asarray(BANNED), 0.0),
        jnp.array([0.9]),
        Sampling(temperature=0),
    )
    assert int(token[0]) == 0  # 6 has the largest logit and is banned


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24])
def test_extreme_uniforms_never_give_an_impossible_token(uniform):
    logits = np.full((1, 6), NEG_INF, np.float32)
    logits[0, 2] = logits[0, 3] = 1.0
    token, _ = sample_tokens(jnp.asarray(logits), jnp.array([uniform]), Sampling())
    assert int(token[0]) == (2 if uniform == 0 else 3)


@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 0.0), ("top_k", -1), ("min_p", 1.0), ("temperature", -1.0)]
)
def test_options_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})
