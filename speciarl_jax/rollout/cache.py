"""Keys and values of prompts and completions: how they are stored, written, moved and attended to.

Stored in the compute dtype, or as int8 with one float32 scale per token and head. The scales never
touch the cache itself: a key's scale multiplies its score, a value's scale its softmax weight, so
the products read int8 converted to the compute dtype, one layer at a time, and no float32 copy of a
cache is made. Keys and values are stored in the order in which the two products read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.devices.layout import Leaf
from speciarl_jax.rollout.placement import Placement

_MASKED = np.float32(-1e30)
_INT8_MAX = np.float32(127)

# (output before division [X, K, Q, A], peak score [X, K, Q], sum of exponentials), float32
Part = tuple[Array, Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues(Generic[Leaf]):
    """Rotated keys and plain values of X prompts or rows and T tokens; one layer is without L.

    Attributes:
        k: [L, X, K, A, T].
        v: [L, X, K, T, A].
        k_scale, v_scale: [L, X, K, T] float32 with int8 storage, else None.
    """

    k: Leaf
    v: Leaf
    k_scale: Leaf | None = None
    v_scale: Leaf | None = None


# All layers in one or, where the decode loop names its layers, one for each.
Cache: TypeAlias = KeyValues[Leaf] | tuple[KeyValues[Leaf], ...]


def shape_of(stored: Cache) -> tuple[int, ...]:
    """[L, X, K, T, A] of values."""
    if isinstance(stored, tuple):
        return (len(stored), *stored[0].v.shape)
    return stored.v.shape


def is_int8(stored: Cache) -> bool:
    """Whether there are scales."""
    first = stored[0] if isinstance(stored, tuple) else stored
    return bool(first.k.dtype == jnp.int8)


def _map_tokens(function: Callable[..., Array], *caches: KeyValues) -> KeyValues:
    """`function(axis of the tokens, counted from the end, array, ...)` for every array."""
    tokens = KeyValues(-1, -2, *(None if caches[0].k_scale is None else -1,) * 2)
    mapped: KeyValues = jax.tree.map(function, tokens, *caches)
    return mapped


def by_layer(stacked: KeyValues) -> tuple[KeyValues, ...]:
    """The cache of each layer."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(stacked.v.shape[0]))


def pack(k: Float[Array, "... A"], v: Float[Array, "... A"], is_int8: bool) -> KeyValues:
    """Keys and values in the dtype in which they are stored, axes as they come."""
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


def empty(shape: tuple[int, ...], dtype: DTypeLike, placement: Placement) -> Cache:
    """A cache of zeros in a dtype, int8 with scales; `shape` is [L, X, K, T, A]."""
    if placement.is_unrolled:
        return tuple(_zeros(shape[1:], dtype) for _ in range(shape[0]))
    return _zeros(shape, dtype)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> KeyValues:
    k, v = jnp.zeros((*shape[:-2], shape[-1], shape[-2]), dtype), jnp.zeros(shape, dtype)
    if dtype != jnp.int8:
        return KeyValues(k, v)
    return KeyValues(k, v, *(jnp.zeros(shape[:-1], jnp.float32) for _ in range(2)))


def store(new: KeyValues) -> KeyValues:
    """A layer's tokens [X, T, K, A] (scales [X, T, K]) in the order of a cache."""

    def order(axis: int, x: Array) -> Array:
        return jnp.moveaxis(x, 1, axis)

    return _map_tokens(order, new)


def write(own: Cache, new: KeyValues, layer: Array | int, column: Array) -> Cache:
    """Puts one token per row, [X, K, A], into a layer's column, in place under jit."""
    place: tuple[Array | int, ...] = () if isinstance(own, tuple) else (layer,)

    def put(axis: int, buffer: Array, values: Array) -> Array:
        column_values = jnp.expand_dims(values, axis)
        start = [*place, *(0,) * column_values.ndim]
        start[axis] = column
        column_values = column_values.reshape(*(1,) * len(place), *column_values.shape)
        written: Array = jax.lax.dynamic_update_slice(buffer, column_values, start)
        return written

    if isinstance(own, tuple):
        return (*own[:layer], _map_tokens(put, own[layer], new), *own[layer + 1 :])
    return _map_tokens(put, own, new)


def one_layer(stored: Cache, layer: Array | int) -> KeyValues:
    """The cache of one layer."""
    if isinstance(stored, tuple):
        return stored[layer]

    def index(x: Array) -> Array:
        found: Array = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        return found

    own: KeyValues = jax.tree.map(index, stored)
    return own


def take_rows(own: Cache, keep: Int[Array, " R2"], placement: Placement) -> Cache:
    """The rows `keep` of each shard; a stack layer by layer, or XLA for TPU copies it whole."""

    def take(layer: KeyValues) -> KeyValues:
        rows: KeyValues = jax.tree.map(lambda x: placement.take(x, keep), layer)
        return rows

    if isinstance(own, tuple):
        return tuple(take(layer) for layer in own)
    taken: KeyValues = jax.lax.map(take, own)
    return taken


def pin(stored: Cache, placement: Placement) -> Cache:
    """The layout that every program keeps."""
    is_stacked = not isinstance(stored, tuple)
    pinned: Cache = jax.tree.map(lambda x: placement.cache(x, is_stacked=is_stacked), stored)
    return pinned


def resize_columns(own: Cache, num_columns: int) -> Cache:
    """More columns, zeros at the end."""

    def grow(axis: int, x: Array) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, num_columns - x.shape[axis])
        return jnp.pad(x, pad)

    if isinstance(own, tuple):
        return tuple(_map_tokens(grow, layer) for layer in own)
    return _map_tokens(grow, own)


def partial_softmax(q: Float[Array, "X K Q A"], kv: KeyValues, mask: Bool[Array, ...]) -> Part:
    """Unnormalised attention of q over one layer, float32 statistics."""
    k, v = kv.k.astype(q.dtype), kv.v.astype(q.dtype)
    scores = jnp.einsum("xkqa,xkat->xkqt", q, k, preferred_element_type=jnp.float32)
    if kv.k_scale is not None:
        scores = scores * kv.k_scale[:, :, None]
    scores = jnp.where(mask, scores * np.float32(q.shape[-1] ** -0.5), _MASKED)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    total = jnp.sum(weights, axis=-1)
    if kv.v_scale is not None:
        weights = weights * kv.v_scale[:, :, None]
    out = jnp.einsum(
        "xkqt,xkta->xkqa", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
    )
    return out, peak, total


def join(parts: tuple[Part, ...]) -> Float[Array, "X K Q A"]:
    """Softmax over the union of the parts' keys."""
    peak = jnp.max(jnp.stack([part[1] for part in parts]), axis=0)
    scales = [jnp.exp(part[1] - peak) for part in parts]
    pairs = list(zip(parts, scales, strict=True))
    total = cast(Array, sum(part[2] * scale for part, scale in pairs))
    out = cast(Array, sum(part[0] * scale[..., None] for part, scale in pairs))
    return out / total[..., None]
