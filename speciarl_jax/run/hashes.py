"""Hashes of a checkpoint: what was saved is what comes back, or it is not used.

Arrays of the device are hashed where they lie, each in one pass that every process of a job takes
part in, so that a hash depends neither on how an array is cut nor on how many hold it. They find
damage, by disk, wire or hand; they are no signature. What is on the host has a SHA-256.
"""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

_SALTS = (0x9E3779B9, 0x7F4A7C15)  # two sums of 32 bits: by chance one damage in 2**64 is not seen
_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


def hash_tree(tree: PyTree) -> dict[str, str]:
    """A hash for each array of a tree of nested dictionaries, by its path (``optim/0001``).

    Every process of a job calls this with the same tree.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = {"/".join(str(key.key) for key in path): _sums(leaf) for path, leaf in leaves}
    return {name: "".join(f"{int(part):08x}" for part in pair) for name, pair in sums.items()}


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of a host array with its dtype and shape."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_json(value: PyTree) -> str:
    """SHA-256 of a JSON object, however it was indented and ordered."""
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@jax.jit
def _sums(array: Array) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Two sums over all elements of mix(bits + mix(place)): mix is one to one.

    So a change of one element always changes both sums, and one of many by chance does not in one
    case of 2**64. No reshape: an array that is cut over devices stays where it is.

    Source: the mixing function is MurmurHash3's fmix32.
    """
    bits = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    size = bits.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    first, second = (
        jnp.sum(_mix(bits + _mix(place + np.uint32(salt))), dtype=jnp.uint32) for salt in _SALTS
    )
    return first, second


def _mix(words: Array) -> Array:
    """One to one on words of 32 bits, uint32."""
    for shift, factor in _MIX:
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return words ^ (words >> 16)
