"""Choosing the next token. One uniform number per row and token; rows never look at each other.

The log-probability that training needs is the one *before* truncation (top-k, top-p, min-p) and
before the repetition penalty, at the sampling temperature, in float32, over the allowed vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.config.schema import Config
from speciarl_jax.policy.vocabulary import NEG_INF


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose; static under jit, so an option that is off costs nothing.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token, and its log-prob is
            reported at temperature 1.
        top_p: smallest set of most likely tokens whose mass reaches it; 1 is off.
        top_k: number of most likely tokens kept; 0 is off.
        min_p: tokens less likely than this share of the most likely one are dropped; 0 is off.
        repetition_penalty: positive logits of tokens already in the completion are divided by it,
            negative ones multiplied; 1 is off. Source: CTRL (arXiv 1909.05858), as transformers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values outside the options' ranges."""
        checks = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p < 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, is_ok in checks.items():
            if not is_ok:
                raise ValueError(f"sampling.{name}={getattr(self, name)}: out of range")

    @property
    def truncates(self) -> bool:
        """True if some tokens are cut, which needs a sort over the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def row_keys(
    seed: int, step: Int[Array, ""], prompt_index: Int[Array, " R"], sample_index: Int[Array, " R"]
) -> Array:
    """One key per rollout: fold_in(seed, step, prompt, sample), whatever batch the row sits in."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def fold(prompt: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, prompt), sample)

    return jax.vmap(fold)(prompt_index, sample_index)


def sample_tokens(
    logits: Float[Array, "R V"],
    uniforms: Float[Array, " R"],
    sampling: Sampling,
    seen: Bool[Array, "R V"] | None = None,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: as `allowed_logits` returns them, float32.
        uniforms: one number in [0, 1) per row; unused when greedy.
        sampling: the options.
        seen: tokens already in each completion; needed with a repetition penalty.

    Returns:
        (token, its log-probability before truncation and penalty).
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    scores = logprobs
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens already seen"
        scores = jnp.where(seen, _penalised(logits, sampling.repetition_penalty), logits)
    if sampling.temperature == 0:
        tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
        tokens = _invert_cdf(_truncated(scores, sampling), uniforms)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen


def _penalised(logits: Float[Array, "R V"], penalty: float) -> Float[Array, "R V"]:
    changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.maximum(changed, NEG_INF)


def _truncated(scores: Float[Array, "R V"], sampling: Sampling) -> Float[Array, "R V"]:
    """Unnormalised log-scores with the cut tokens at NEG_INF; the most likely one always stays.

    The order is the field's: top-k, then top-p over what is left, then min-p.
    """
    if not sampling.truncates:
        return scores
    ranked = -jnp.sort(-scores, axis=-1)  # [R, V], most likely first
    if sampling.top_k:
        keep = (jnp.arange(ranked.shape[-1]) < sampling.top_k)[None]
        ranked = jnp.where(keep, ranked, NEG_INF)
    if sampling.top_p < 1:
        probs = jax.nn.softmax(ranked, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        ranked = jnp.where(mass_before < sampling.top_p, ranked, NEG_INF)
    if sampling.min_p > 0:
        floor = ranked[:, :1] + np.float32(np.log(sampling.min_p))
        ranked = jnp.where(ranked >= floor, ranked, NEG_INF)
    # What is kept ends at the first rank that is cut: running sums fall by a rounding now and then,
    # so that top-p may seem to want a later rank again.
    places = jnp.arange(ranked.shape[-1])
    num_kept = jnp.min(jnp.where(ranked > NEG_INF / 2, len(places), places), axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(ranked, jnp.maximum(num_kept - 1, 0), axis=-1)
    return jnp.where(scores >= threshold, scores, NEG_INF)


def _invert_cdf(scores: Float[Array, "R V"], uniforms: Float[Array, " R"]) -> Int[Array, " R"]:
    """The first token with weight whose cumulative weight is above the target, else the last one.

    The weight has to be asked for: a running sum in float32 over a large vocabulary is a tree of
    sums and not monotone, so the number of entries below the target can be that of a cut token.
    """
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    cdf = jnp.cumsum(weights, axis=-1)
    target = uniforms[:, None] * cdf[:, -1:]
    tokens = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    has_weight = weights > 0
    first = jnp.min(jnp.where(has_weight & (cdf > target), tokens, len(tokens)), axis=-1)
    # Rounding can put the target on the total: the last token with any weight takes it.
    last = jnp.max(jnp.where(has_weight, tokens, 0), axis=-1)
    return jnp.minimum(first, last)


def training_sampling(config: Config) -> Sampling:
    """Sampling options of training rollouts."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    return Sampling(**{name: getattr(config.rollout, name) for name in names})
