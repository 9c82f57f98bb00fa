"""Rotary position embeddings of both halves of Qwen2.5-VL. Angles are always float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from speciarl_jax.arch import TextArch, VisionArch
from speciarl_jax.policy.layers import last_axis


def _inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """``theta^(-2i/dim)`` for i in 0..dim/2-1, rounded as float32 like the reference."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def vision_angles(positions: Int[Array, "I N 2"], arch: VisionArch) -> Float[Array, "I N A_half"]:
    """Axial angles: the first quarter of the head turns with the row, the second with the column.

    `positions` are (row, column) of each patch in its image, in patches; any value at padding.
    Angles are radians for half of the head dimension; both halves use the same ones.

    Source: transformers Qwen2_5_VLVisionRotaryEmbedding (frequencies from arange(0, A/2, 2)).
    """
    frequencies = _inverse_frequencies(arch.head_dim // 2, arch.rope_theta)
    ids = positions[..., None].astype(jnp.float32)
    angles = ids * last_axis(frequencies, ids)  # [I, N, 2, A/4]
    return angles.reshape(*angles.shape[:-2], -1)


def text_angles(positions: Int[Array, "... 3 T"], arch: TextArch) -> Float[Array, "... T A_half"]:
    """M-RoPE angles: contiguous chunks of the half dimension turn with time, row and column.

    `positions` are (t, h, w) ids, equal to each other for text tokens; any value at padding.
    Angles are radians for half of the head dimension; both halves use the same ones.

    Source: transformers Qwen2_5_VLRotaryEmbedding.recomposition_frequencies.
    """
    frequencies = _inverse_frequencies(arch.head_dim, arch.rope_theta)
    axis_of_frequency = np.repeat(np.arange(3), arch.mrope_section)  # [A/2]
    chosen = jnp.take(positions, axis_of_frequency, axis=-2)  # [..., A/2, T]
    ids = jnp.swapaxes(chosen, -1, -2).astype(jnp.float32)
    return ids * last_axis(frequencies, ids)


def rotate(
    x: Float[Array, "... H A"], angles: Float[Array, "... A_half"]
) -> Float[Array, "... H A"]:
    """Turns each pair (x[i], x[i + A/2]) by its angle, in float32, and returns x's dtype.

    Source: transformers apply_rotary_pos_emb and apply_rotary_pos_emb_vision. In bfloat16 the
    former multiplies in bfloat16; here the product stays float32 until the end.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]  # [..., 1, A/2]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
