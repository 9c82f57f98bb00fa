"""Keys and values of prompts and completions: how they are stored, written, moved and attended to.

Stored in the compute dtype, or as int8 with one float32 scale per token and head. The scales never
touch the cache itself: a key's scale multiplies its score, a value's scale its softmax weight, so
the products read int8 converted to the compute dtype, one layer at a time, and no float32 copy of a
cache is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.rollout.placement import Placement

_MASKED = np.float32(-1e30)
_INT8_MAX = np.float32(127)

# (output before division [X, K, Q, A], peak score [X, K, Q], sum of exponentials), float32
Part = tuple[Array, Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Rotated keys and plain values.

    Attributes:
        k, v: [L, X, T, K, A] (one layer: [X, T, K, A]); X prompts or rows, T tokens.
        k_scale, v_scale: [L, X, T, K] float32 with int8 storage, else None.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def pack(k: Float[Array, "... K A"], v: Float[Array, "... K A"], is_int8: bool) -> KeyValues:
    """Keys and values as they are stored."""
    if not is_int8:
        return KeyValues(k, v)
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return KeyValues(k, v, k_scale, v_scale)


def quantise(x: Float[Array, "... A"]) -> tuple[Int[Array, "... A"], Float[Array, ...]]:
    """Nearest int8 multiple of a scale per vector: x is about q * scale, error <= scale / 2."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX
    divisor = jnp.where(scale > 0, scale, np.float32(1))
    return jnp.round(x / divisor[..., None]).astype(jnp.int8), scale


def empty(shape: tuple[int, ...], dtype: DTypeLike, is_int8: bool) -> KeyValues:
    """A cache of zeros; `shape` is [L, X, T, K, A]."""
    if not is_int8:
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    values = [jnp.zeros(shape, jnp.int8) for _ in range(2)]
    scales = [jnp.zeros(shape[:-1], jnp.float32) for _ in range(2)]
    return KeyValues(*values, *scales)


def write(own: KeyValues, new: KeyValues, layer: Array, column: Array) -> KeyValues:
    """Puts one token per row, [X, K, A], into a layer's column, in place under jit."""

    def put(buffer: Array, values: Array) -> Array:
        start = (layer, 0, column, *(0,) * (buffer.ndim - 3))
        return jax.lax.dynamic_update_slice(buffer, values[None, :, None], start)

    return jax.tree.map(put, own, new)


def one_layer(stacked: KeyValues, layer: Array) -> KeyValues:
    """The cache of one layer, [X, T, K, A]."""

    def index(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)

    return jax.tree.map(index, stacked)


def take_rows(own: KeyValues, keep: Int[Array, " R2"], placement: Placement) -> KeyValues:
    """The rows `keep` of each shard."""
    return jax.tree.map(lambda x: placement.take(x, keep, axis=1), own)


def resize_columns(own: KeyValues, num_columns: int) -> KeyValues:
    """More columns, zeros at the end."""

    def grow(x: Array) -> Array:
        pad = [(0, num_columns - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, pad)

    return jax.tree.map(grow, own)


def partial_softmax(q: Float[Array, "X K Q A"], kv: KeyValues, mask: Bool[Array, ...]) -> Part:
    """Unnormalised attention of q over one layer's [X, T, K, A], float32 statistics."""
    k, v = kv.k.astype(q.dtype), kv.v.astype(q.dtype)
    scores = jnp.einsum("xkqa,xtka->xkqt", q, k, preferred_element_type=jnp.float32)
    if kv.k_scale is not None:
        scores = scores * _per_key(kv.k_scale)
    scores = jnp.where(mask, scores * np.float32(q.shape[-1] ** -0.5), _MASKED)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    total = jnp.sum(weights, axis=-1)
    if kv.v_scale is not None:
        weights = weights * _per_key(kv.v_scale)
    out = jnp.einsum(
        "xkqt,xtka->xkqa", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
    )
    return out, peak, total


def _per_key(scale: Float[Array, "X T K"]) -> Float[Array, "X K 1 T"]:
    return scale.transpose(0, 2, 1)[:, :, None]


def join(parts: tuple[Part, ...]) -> Float[Array, "X K Q A"]:
    """Softmax over the union of the parts' keys."""
    peak = jnp.max(jnp.stack([part[1] for part in parts]), axis=0)
    scales = [jnp.exp(part[1] - peak) for part in parts]
    total: Any = sum(part[2] * scale for part, scale in zip(parts, scales, strict=True))
    out = sum(part[0] * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return out / total[..., None]
