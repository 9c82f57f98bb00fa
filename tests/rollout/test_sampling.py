"""Token choice: every option's frequencies against exact probabilities, and its edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.policy.vocabulary import NEG_INF, allowed_logits
from speciarl_jax.rollout.sampling import Sampling, _truncated, sample_tokens

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


# --- a real vocabulary: 152,064 rows, of which the tokenizer has 151,643 -------------------------

VOCABULARY, TOKENS = 152_064, 151_643


def real_logits(seed: int, spread: float) -> np.ndarray:
    """[1, V] float32; rows beyond the tokenizer are banned."""
    logits = np.random.default_rng(seed).normal(size=(1, VOCABULARY)) * spread
    return np.where(np.arange(VOCABULARY) < TOKENS, logits, NEG_INF).astype(np.float32)


def running_sum(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """(weights, their cumulative sum) [V] as the sampler has them on this machine."""
    scores = _truncated(jax.nn.log_softmax(jnp.asarray(logits), axis=-1), sampling)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return np.asarray(weights)[0], np.asarray(jnp.cumsum(weights, axis=-1))[0]


@pytest.mark.parametrize(
    "sampling", [Sampling(), pytest.param(Sampling(top_p=0.95), marks=pytest.mark.slow)], ids=str
)
def test_no_uniform_gives_a_banned_or_cut_token(sampling):
    """All 2^23 float32 uniforms of `jax.random.uniform`, over a sum that is not monotone.

    The rule in numpy for every uniform; the sampler itself where counting the entries below the
    target would name another token, and at both ends.
    """
    logits = real_logits(seed=0, spread=3.0)
    weights, cdf = running_sum(logits, sampling)
    assert (np.diff(cdf) < 0).any(), "the sum is monotone here: choose other logits"
    uniforms = np.arange(2**23, dtype=np.float32) / np.float32(2**23)
    targets = uniforms * cdf[-1]
    reached = np.maximum.accumulate(np.where(weights > 0, cdf, 0))
    wanted = np.searchsorted(reached, targets, side="right")
    last = np.flatnonzero(weights > 0)[-1]
    wanted = np.minimum(wanted, last)
    assert (weights[wanted] > 0).all()
    counted = np.minimum(np.searchsorted(np.sort(cdf), targets, side="right"), last)
    differs = np.flatnonzero(counted != wanted)
    assert 0 < len(differs) < 1e-3 * len(uniforms)  # where the sum rises, both are the same
    to_try = np.unique(np.concatenate([differs[:60], [0, 1, 2**22, 2**23 - 2, 2**23 - 1]]))
    rows = np.repeat(logits, len(to_try), axis=0)
    tokens, logprobs = sample_tokens(jnp.asarray(rows), jnp.asarray(uniforms[to_try]), sampling)
    np.testing.assert_array_equal(tokens, wanted[to_try])
    assert np.isfinite(logprobs).all()


def test_a_sum_that_falls_at_top_p_keeps_no_token_beyond_it():
    """top_p between a running sum and the smaller one after it: the first decides."""
    logits = real_logits(seed=1, spread=3.0)
    logprobs = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    ranked = jax.nn.softmax(-jnp.sort(-logprobs, axis=-1), axis=-1)
    before = np.asarray(jnp.cumsum(ranked, axis=-1) - ranked)[0]
    fall = np.flatnonzero(before[1:] < before[:-1])[0]
    top_p = float(before[fall])
    assert before[fall + 1] < top_p
    kept = np.asarray(_truncated(logprobs, Sampling(top_p=top_p)))[0] > NEG_INF / 2
    assert kept.sum() == np.argmax(before >= top_p)
    assert not kept[TOKENS:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.0)], ids=str)
def test_logits_that_are_no_numbers_show_in_the_logprob(bad, sampling):
    """One row of two: its neighbour is as it would be alone."""
    logits = np.stack([LOGITS, LOGITS])
    logits[1, 3] = bad
    tokens, logprobs = sample_tokens(jnp.asarray(logits), jnp.array([0.5, 0.5]), sampling)
    assert np.isfinite(logprobs[0])
    assert np.isnan(logprobs[1])
    assert 0 <= int(tokens[1]) < len(LOGITS)
