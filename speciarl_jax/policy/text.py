"""The language model's layers, with attention left open.

Prefill, decode, the trainer's shared-prefix tree and the plain causal forward differ only in what a
query may look at and where keys and values live. So a layer takes an `attend` function, and
`TextModel.run` threads whatever that function needs through one scan over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speciarl_jax.arch import TextArch
from speciarl_jax.devices.layout import Params
from speciarl_jax.policy.attention import attend, causal_mask
from speciarl_jax.policy.layers import Dtypes, GatedMLP, Linear, RMSNorm
from speciarl_jax.policy.rope import rotate, text_angles

Inputs = ParamSpec("Inputs")
Outputs = TypeVar("Outputs")
Carry = TypeVar("Carry")  # threaded through the layers: a key-value cache, or None
Result = TypeVar("Result")  # what a layer leaves: keys and values of a prompt, or None
# (q, k, v, layer index, carry) -> (output, carry, per-layer result)
AttendFn: TypeAlias = Callable[
    [Array, Array, Array, Array | int, Carry], tuple[Array, Carry, Result]
]


def checkpointed(body: Callable[Inputs, Outputs], remat: str) -> Callable[Inputs, Outputs]:
    """Wraps a scan body: what the backward pass keeps and what it computes again.

    Args:
        body: the scan's function.
        remat: ``none`` keeps every intermediate; ``dots`` keeps the outputs of matmuls with
            weights; ``full`` keeps only the layer's input.

    Raises:
        ValueError: another name.
    """
    if remat == "none":
        return body
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(body, policy=policy, prevent_cse=False)
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    raise ValueError(f"model.remat={remat!r}: expected one of none, dots, full")


class TextBlock(nnx.Module):
    """Pre-norm grouped-query attention and gated MLP."""

    def __init__(self, arch: TextArch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates one block."""
        width, kv_width = arch.hidden_size, arch.num_kv_heads * arch.head_dim

        def make(d_in: int, d_out: int, use_bias: bool) -> Linear:
            return Linear(d_in, d_out, use_bias=use_bias, dtypes=dtypes, rngs=rngs)

        self.input_norm = RMSNorm(width, arch.rms_norm_eps, dtypes=dtypes)
        self.post_attention_norm = RMSNorm(width, arch.rms_norm_eps, dtypes=dtypes)
        self.q_proj = make(width, width, True)
        self.k_proj = make(width, kv_width, True)
        self.v_proj = make(width, kv_width, True)
        self.o_proj = make(width, width, False)
        self.mlp = GatedMLP(width, arch.intermediate_size, use_bias=False, dtypes=dtypes, rngs=rngs)
        self.head_dim = arch.head_dim

    def __call__(
        self,
        hidden: Float[Array, "... D"],
        angles: Float[Array, "... A_half"],
        attend_fn: AttendFn[Carry, Result],
        layer: Int[Array, ""] | int,
        carry: Carry,
    ) -> tuple[Float[Array, "... D"], Carry, Result]:
        """Applies the block; `attend_fn` sees rotated q [..., H, A] and k, plain v [..., K, A]."""
        normed = self.input_norm(hidden)
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_proj(normed).reshape(heads), angles)
        k = rotate(self.k_proj(normed).reshape(heads), angles)
        v = self.v_proj(normed).reshape(heads)
        out, carry, result = attend_fn(q, k, v, layer, carry)
        hidden = hidden + self.o_proj(out.reshape(hidden.shape))
        return hidden + self.mlp(self.post_attention_norm(hidden)), carry, result


class TextModel(nnx.Module):
    """Token embedding, scanned blocks, final norm, head."""

    def __init__(self, arch: TextArch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates the model; block weights are stacked along a leading layer axis."""
        shape = (arch.vocab_size, arch.hidden_size)
        table_init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(table_init(rngs.params(), shape, dtypes.param))

        @nnx.split_rngs(splits=arch.num_layers)
        @nnx.vmap
        def make_blocks(rngs: nnx.Rngs) -> TextBlock:
            return TextBlock(arch, dtypes=dtypes, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps, dtypes=dtypes)
        if not arch.tie_word_embeddings:
            self.lm_head = Linear(
                arch.hidden_size, arch.vocab_size, use_bias=False, dtypes=dtypes, rngs=rngs
            )
        self.arch = arch
        self.dtype = dtypes.compute

    def embed(
        self,
        tokens: Int[Array, ...],
        image_rows: Int[Array, ...] | None = None,
        image_embeds: Float[Array, "IM D"] | None = None,
    ) -> Float[Array, "... D"]:
        """Looks tokens up; positions with image_rows >= 0 take that row of `image_embeds`."""
        hidden = jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
        if image_rows is None:
            return hidden
        assert image_embeds is not None, "image_rows without image_embeds"
        from_image = jnp.take(image_embeds, jnp.maximum(image_rows, 0), axis=0)
        return jnp.where((image_rows >= 0)[..., None], from_image.astype(self.dtype), hidden)

    def run(
        self,
        hidden: Float[Array, "... D"],
        angles: Float[Array, "... A_half"],
        attend_fn: AttendFn[Carry, Result],
        carry: Carry,
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "... D"], Carry, Result]:
        """Runs all layers on embedded tokens, threading `carry` (a key-value cache) through them.

        Returns:
            (normed hidden states, final carry, per-layer results stacked on a leading axis).
        """
        graphdef, states = nnx.split(self.blocks)

        def body(
            state: tuple[Array, Carry], layer: tuple[Params, Array]
        ) -> tuple[tuple[Array, Carry], Result]:
            block = nnx.merge(graphdef, layer[0])
            hidden, carry, result = block(state[0], angles, attend_fn, layer[1], state[1])
            return (hidden, carry), result

        stack = (states, jnp.asarray(np.arange(self.arch.num_layers)))
        (hidden, carry), results = jax.lax.scan(checkpointed(body, remat), (hidden, carry), stack)
        return self.norm(hidden), carry, results

    def run_unstacked(
        self,
        layers: Sequence[Params],
        hidden: Float[Array, "... D"],
        angles: Float[Array, "... A_half"],
        attend_fn: AttendFn[Carry, None],
        carry: Carry,
    ) -> tuple[Float[Array, "... D"], Carry]:
        """`run` without a scan, over the layers of `unstacked` and with their numbers."""
        graphdef, _ = nnx.split(self.blocks)
        for index, layer in enumerate(layers):
            block = nnx.merge(graphdef, layer)
            hidden, carry, _ = block(hidden, angles, attend_fn, index, carry)
        return self.norm(hidden), carry

    def unstacked(self) -> list[Params]:
        """Each layer's own weights, cut out of the stack: a copy."""
        stacked = nnx.state(self.blocks)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.arch.num_layers)]

    def forward(
        self,
        hidden: Float[Array, "B T D"],
        positions: Int[Array, "B 3 T"],
        lengths: Int[Array, " B"],
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """Plain causal forward over left-aligned sequences; states past a length are finite."""
        mask = causal_mask(lengths, hidden.shape[1])

        def attend_fn(
            q: Array, k: Array, v: Array, layer: Array | int, carry: None
        ) -> tuple[Array, None, None]:
            return attend(q, k, v, mask), None, None

        return self.run(hidden, text_angles(positions, self.arch), attend_fn, None, remat=remat)[0]

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token in float32, from the head or the tied embedding."""
        if self.arch.tie_word_embeddings:
            table = self.embedding[...].astype(self.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.lm_head.kernel[...].astype(self.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
