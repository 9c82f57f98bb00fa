"""Softmax attention over one or two sets of keys, with a backward pass of plain matmuls.

`attend` is attention over one sequence. `attend_shared` is the trainer's shared-prefix form: every
completion of a group looks at the group's one prompt and at itself, in one softmax.

Scores and softmax are float32 whatever the inputs. Masks are boolean, True where a query may look.
A row that may look nowhere returns a finite average, which its caller discards.

The gradient is written out because automatic differentiation orders it badly for XLA on CPU: it
transposes float32 score arrays before contracting them, which made the backward pass 3.5 times
slower than the five matmuls it consists of (docs/benchmarks.md). The formulas are exact.
"""

from __future__ import annotations

from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Pairs (k, v) [Y, T, A] of key sets, and where each may be looked at (None for everywhere).
_Parts: TypeAlias = tuple[tuple[Array, Array], ...]
_Masks: TypeAlias = tuple[Array | np.ndarray | None, ...]
_Residuals: TypeAlias = tuple[Array, _Parts, list[Array], Array]

_MASKED = np.float32(-1e30)  # finite: a fully masked row must not become NaN, nor poison gradients


def attend(
    q: Float[Array, "B Tq H A"],
    k: Float[Array, "B Tk K A"],
    v: Float[Array, "B Tk K A"],
    mask: Bool[Array, "#B #Tq Tk"] | None = None,
) -> Float[Array, "B Tq H A"]:
    """Attention with grouped key-value heads, in `q`'s dtype; without `mask` all keys are seen.

    H is a multiple of K, and consecutive query heads share a key-value head.

    Source: transformers eager_attention_forward.
    """
    batch, q_len, num_heads, dim = q.shape
    kv = k.shape[2]
    rep = num_heads // kv
    scale = np.asarray(dim**-0.5, q.dtype)
    folded = (q * scale).reshape(batch, q_len, kv, rep, dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch * kv, rep * q_len, dim)
    if mask is not None:
        shape = (batch, kv, rep, q_len, k.shape[1])
        mask = jnp.broadcast_to(mask[:, None, None], shape).reshape(batch * kv, rep * q_len, -1)
    out = _attend_parts(folded, ((_fold_heads(k), _fold_heads(v)),), (mask,))
    out = out.reshape(batch, kv, rep, q_len, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, q_len, num_heads, dim)


def attend_shared(
    q: Float[Array, "P G C H A"],
    k: Float[Array, "P G C K A"],
    v: Float[Array, "P G C K A"],
    prompt_k: Float[Array, "P S K A"],
    prompt_v: Float[Array, "P S K A"],
    sees_prompt: Bool[Array, "P S"],
) -> Float[Array, "P G C H A"]:
    """Completions over [prompt, own tokens so far]; prompt keys and values are not copied G times.

    `sees_prompt` is True for real prompt tokens.
    """
    prompts, group, width, heads, dim = q.shape
    kv, prompt_len = k.shape[3], prompt_k.shape[1]
    rep = heads // kv
    scale = np.asarray(dim**-0.5, q.dtype)
    folded = (q * scale).reshape(prompts, group, width, kv, rep, dim).transpose(0, 3, 1, 4, 2, 5)
    folded = folded.reshape(prompts * kv, group * rep * width, dim)

    def own(x: Array) -> Array:  # [P, G, C, K, A] -> [P*K*G, C, A]
        return x.transpose(0, 3, 1, 2, 4).reshape(-1, width, dim)

    shape = (prompts, kv, group * rep * width, prompt_len)
    prompt_mask = jnp.broadcast_to(sees_prompt[:, None, None], shape)
    order = np.arange(width)
    causal = np.tile(order[None, :] <= order[:, None], (rep, 1))[None]  # [1, rep*C, C]
    out = _attend_parts(
        folded,
        ((_fold_heads(prompt_k), _fold_heads(prompt_v)), (own(k), own(v))),
        (prompt_mask.reshape(prompts * kv, -1, prompt_len), causal),
    )
    out = out.reshape(prompts, kv, group, rep, width, dim).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(prompts, group, width, heads, dim)


def _fold_heads(x: Float[Array, "B T K A"]) -> Float[Array, "BK T A"]:
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


@jax.custom_vjp
def _attend_parts(q: Float[Array, "X Q A"], parts: _Parts, masks: _Masks) -> Float[Array, "X Q A"]:
    """One softmax of q over the union of several key sets.

    Args:
        q: scaled queries.
        parts: pairs (k, v) [Y, T, A]; Y is a multiple of X, and q reshaped to [Y, -1, A] says
            which queries look at which keys.
        masks: per part, broadcastable to [Y, Q*X/Y, T], or None.
    """
    return _attend_parts_fwd(q, parts, masks)[0]


def _attend_parts_fwd(q: Array, parts: _Parts, masks: _Masks) -> tuple[Array, _Residuals]:
    scores = []
    for (k, _), mask in zip(parts, masks, strict=True):
        local = jnp.einsum("yqa,yta->yqt", _regroup(q, k), k, preferred_element_type=jnp.float32)
        if mask is not None:
            local = jnp.where(mask, local, _MASKED)
        scores.append(local)
    peaks = [_ungroup(jnp.max(s, axis=-1), q) for s in scores]
    peak = peaks[0] if len(peaks) == 1 else jnp.maximum(*peaks)
    weights = [jnp.exp(s - _regroup(peak, s)[..., None]) for s in scores]
    total = cast(Array, sum(_ungroup(jnp.sum(w, axis=-1), q) for w in weights))  # [X, Q]
    weights = [w / _regroup(total, w)[..., None] for w in weights]
    outs = (
        _ungroup(jnp.einsum("yqt,yta->yqa", w.astype(v.dtype), v), q)
        for w, (_, v) in zip(weights, parts, strict=True)
    )
    out = cast(Array, sum(outs))
    return out, (q, parts, weights, out)


def _attend_parts_bwd(residuals: _Residuals, d_out: Array) -> tuple[Array, _Parts, None]:
    q, parts, weights, out = residuals
    shared = jnp.sum((d_out * out).astype(jnp.float32), axis=-1)  # [X, Q]
    d_q, d_parts = jnp.zeros_like(q), []
    for (k, v), weight in zip(parts, weights, strict=True):
        d_local = _regroup(d_out, weight)
        d_v = jnp.einsum("yqt,yqa->yta", weight.astype(v.dtype), d_local)
        d_weight = jnp.einsum("yqa,yta->yqt", d_local, v, preferred_element_type=jnp.float32)
        d_score = (weight * (d_weight - _regroup(shared, weight)[..., None])).astype(q.dtype)
        d_q = d_q + _ungroup(jnp.einsum("yqt,yta->yqa", d_score, k), q)
        d_parts.append((jnp.einsum("yqt,yqa->yta", d_score, _regroup(q, k)), d_v))
    return d_q, tuple(d_parts), None


_attend_parts.defvjp(_attend_parts_fwd, _attend_parts_bwd)


def _regroup(x: Array, like: Array) -> Array:
    """[X, Q, ...] to [Y, Q*X/Y, ...], Y taken from `like`."""
    return x.reshape(like.shape[0], -1, *x.shape[2:])


def _ungroup(x: Array, q: Array) -> Array:
    """Back to the queries' own [X, Q, ...]."""
    return x.reshape(*q.shape[:2], *x.shape[2:])


def causal_mask(lengths: Int[Array, " B"], size: int) -> Bool[Array, "B T T"]:
    """A token sees itself and those before it, within its sequence's real length."""
    order = jnp.arange(size)
    return (order[None, :] <= order[:, None])[None] & (order[None, None] < lengths[:, None, None])
