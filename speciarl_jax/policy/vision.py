"""The vision tower: patches in, one embedding per merged token out.

Patches arrive in *window order with every window padded to full size* (built on the host by
`speciarl_jax.data.images.window_layout`), so window attention is one dense batched product, not a
loop, and all images of a batch have one shape.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.arch import VisionArch
from speciarl_jax.devices.layout import Params
from speciarl_jax.policy.attention import attend
from speciarl_jax.policy.flash import attend_image
from speciarl_jax.policy.layers import Dtypes, GatedMLP, Linear, RMSNorm
from speciarl_jax.policy.rope import rotate, vision_angles
from speciarl_jax.policy.text import checkpointed

_NORM_EPS = 1e-6


class VisionBlock(nnx.Module):
    """Pre-norm attention and gated MLP; attention is within windows or over the whole image."""

    def __init__(self, arch: VisionArch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates one block."""
        size = arch.hidden_size
        self.norm1 = RMSNorm(size, _NORM_EPS, dtypes=dtypes)
        self.norm2 = RMSNorm(size, _NORM_EPS, dtypes=dtypes)
        self.qkv = Linear(size, 3 * size, use_bias=True, dtypes=dtypes, rngs=rngs)
        self.proj = Linear(size, size, use_bias=True, dtypes=dtypes, rngs=rngs)
        self.mlp = GatedMLP(size, arch.intermediate_size, use_bias=True, dtypes=dtypes, rngs=rngs)
        self.num_heads = arch.num_heads
        self.window_patches = arch.window_patches

    def __call__(
        self,
        hidden: Float[Array, "I N D"],
        angles: Float[Array, "I N A_half"],
        mask: Bool[Array, "I N"],
        is_full: Bool[Array, ""] | bool,
        mesh: Mesh | None = None,
    ) -> Float[Array, "I N D"]:
        """Applies the block, over whole images if `is_full` and within windows if not.

        `mask` is True for real patches, which see no padded one; those stay finite.
        """
        qkv = self.qkv(self.norm1(hidden))
        qkv = qkv.reshape(*hidden.shape[:2], 3, self.num_heads, -1)  # [I, N, 3, H, A]
        q, k = rotate(qkv[:, :, 0], angles), rotate(qkv[:, :, 1], angles)
        v = qkv[:, :, 2]
        whole = functools.partial(attend_image, mesh=mesh)
        out = jax.lax.cond(is_full, whole, self._attend_windows, q, k, v, mask)
        hidden = hidden + self.proj(out.reshape(hidden.shape))
        return hidden + self.mlp(self.norm2(hidden))

    def _attend_windows(self, q: Array, k: Array, v: Array, mask: Array) -> Array:
        def split(x: Array) -> Array:
            return x.reshape(-1, self.window_patches, *x.shape[2:])  # [I*W, U, ...]

        return attend(split(q), split(k), split(v), split(mask)[:, None]).reshape(q.shape)


class PatchMerger(nnx.Module):
    """Joins the patches of each merge square and maps them to the language model's width.

    Source: transformers Qwen2_5_VLPatchMerger. Its GELU is the exact one (erf), not the tanh form.
    """

    def __init__(self, arch: VisionArch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates norm and the two layers."""
        inner = arch.hidden_size * arch.merge_unit
        self.ln_q = RMSNorm(arch.hidden_size, _NORM_EPS, dtypes=dtypes)
        self.mlp_0 = Linear(inner, inner, use_bias=True, dtypes=dtypes, rngs=rngs)
        self.mlp_2 = Linear(inner, arch.out_hidden_size, use_bias=True, dtypes=dtypes, rngs=rngs)
        self.inner = inner

    def __call__(self, hidden: Float[Array, "I N Dv"]) -> Float[Array, "I M D"]:
        """Merges each run of merge_unit consecutive patches."""
        merged = self.ln_q(hidden).reshape(hidden.shape[0], -1, self.inner)
        return self.mlp_2(jax.nn.gelu(self.mlp_0(merged), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, `depth` scanned blocks, merger."""

    def __init__(self, arch: VisionArch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates the tower; block weights are stacked along a leading layer axis."""
        self.patch_embed = Linear(
            arch.patch_dim, arch.hidden_size, use_bias=False, dtypes=dtypes, rngs=rngs
        )

        @nnx.split_rngs(splits=arch.depth)
        @nnx.vmap
        def make_blocks(rngs: nnx.Rngs) -> VisionBlock:
            return VisionBlock(arch, dtypes=dtypes, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.merger = PatchMerger(arch, dtypes=dtypes, rngs=rngs)
        self.arch = arch

    def __call__(
        self,
        patches: Float[Array, "I N patch_dim"],
        positions: Int[Array, "I N 2"],
        mask: Bool[Array, "I N"],
        remat: str = "none",
        mesh: Mesh | None = None,
    ) -> Float[Array, "I M D"]:
        """Encodes images.

        Args:
            patches: normalised pixels in padded window order; 0 at padding.
            positions: (row, column) of each patch, in patches; 0 at padding.
            mask: True for real patches.
            remat: see `text.checkpointed`.
            mesh: where the images lie; chooses the attention kernel. None for the plain form.

        Returns:
            Merged tokens in the same padded window order, M = N / merge_unit; rows of padding are
            finite and never used.

        Source: transformers Qwen2_5_VisionTransformerPretrainedModel. The Conv3d over whole
        patches is a matmul; the reverse permutation is left to the caller's index map.
        """
        angles = vision_angles(positions, self.arch)
        graphdef, states = nnx.split(self.blocks)
        is_full = np.isin(np.arange(self.arch.depth), self.arch.full_attention_blocks)

        def body(hidden: Array, layer: tuple[Params, Array]) -> tuple[Array, None]:
            state, is_full_block = layer
            block = nnx.merge(graphdef, state)
            return block(hidden, angles, mask, is_full_block, mesh), None

        scan_body = checkpointed(body, remat)
        stack = (states, jnp.asarray(is_full))
        hidden, _ = jax.lax.scan(scan_body, self.patch_embed(patches), stack)
        return self.merger(hidden)
