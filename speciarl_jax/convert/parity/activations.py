"""Our activations, component by component, under names that the parity report shares with torch.

One scan over the layers whose body also returns its output: compile time does not grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.policy.attention import attend, causal_mask
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.rope import text_angles, vision_angles
from speciarl_jax.policy.text import TextBlock, TextModel
from speciarl_jax.policy.vision import VisionBlock, VisionTower

Block = TypeVar("Block", TextBlock, VisionBlock)

PATCH_EMBED = "vision/patch_embed"
VISION_BLOCKS = "vision/block"
MERGER = "vision/merger"
EMBEDDING = "text/embedding"
DECODER_LAYERS = "text/layer"
FINAL_NORM = "text/norm"
LOGITS = "text/logits"


def _each_layer(
    blocks: Block,
    hidden: Array,
    per_layer: Array,
    apply: Callable[[Block, Array, Array], Array],
) -> tuple[Array, Array]:
    """The last state and the output of every layer, stacked."""
    graphdef, states = nnx.split(blocks)

    def body(hidden: Array, layer: tuple[nnx.State[str, object], Array]) -> tuple[Array, Array]:
        hidden = apply(nnx.merge(graphdef, layer[0]), hidden, layer[1])
        return hidden, hidden

    return jax.lax.scan(body, hidden, (states, per_layer))


def vision_activations(
    tower: VisionTower,
    patches: Float[Array, "I N patch_dim"],
    positions: Int[Array, "I N 2"],
    mask: Bool[Array, "I N"],
) -> dict[str, Array]:
    """Outputs of patch embedding [I, N, Dv], every block [L, I, N, Dv], merger [I, M, D].

    All in padded window order, see `speciarl_jax.data.images.window_layout`.
    """
    angles = vision_angles(positions, tower.arch)
    is_full = np.isin(np.arange(tower.arch.depth), tower.arch.full_attention_blocks)

    def apply(block: VisionBlock, hidden: Array, is_full: Array) -> Array:
        return block(hidden, angles, mask, is_full)

    embedded = tower.patch_embed(patches)
    hidden, blocks = _each_layer(tower.blocks, embedded, jnp.asarray(is_full), apply)
    return {PATCH_EMBED: embedded, VISION_BLOCKS: blocks, MERGER: tower.merger(hidden)}


def text_activations(
    text: TextModel,
    hidden: Float[Array, "B T D"],
    positions: Int[Array, "B 3 T"],
    lengths: Int[Array, " B"],
) -> dict[str, Array]:
    """Outputs of every decoder layer [L, B, T, D], the final norm [B, T, D], the head [B, T, V]."""
    angles = text_angles(positions, text.arch)
    mask = causal_mask(lengths, hidden.shape[1])

    def attend_fn(
        q: Array, k: Array, v: Array, layer: Array | int, carry: None
    ) -> tuple[Array, None, None]:
        return attend(q, k, v, mask), carry, None

    def apply(block: TextBlock, hidden: Array, layer: Array) -> Array:
        return block(hidden, angles, attend_fn, layer, None)[0]

    order = jnp.arange(text.arch.num_layers)
    last, layers = _each_layer(text.blocks, hidden, order, apply)
    normed = text.norm(last)
    return {
        EMBEDDING: hidden,
        DECODER_LAYERS: layers,
        FINAL_NORM: normed,
        LOGITS: text.logits(normed),
    }


@functools.partial(jax.jit, static_argnames="graphdef")
def policy_activations(
    graphdef: nnx.GraphDef[Policy], state: nnx.State[str, object], batch: dict[str, Array]
) -> dict[str, Array]:
    """All activations of one batch.

    `batch` has ``tokens`` [B, T], ``positions`` [B, 3, T], ``lengths`` [B], ``image_rows`` [B, T],
    ``patches`` [I, N, patch_dim], ``patch_positions`` [I, N, 2], ``patch_mask`` [I, N].
    """
    policy: Policy = nnx.merge(graphdef, state)
    found = vision_activations(
        policy.visual, batch["patches"], batch["patch_positions"], batch["patch_mask"]
    )
    table = jnp.reshape(found[MERGER], (-1, found[MERGER].shape[-1]))
    hidden = policy.text.embed(batch["tokens"], batch["image_rows"], table)
    return found | text_activations(policy.text, hidden, batch["positions"], batch["lengths"])


@functools.partial(jax.jit, static_argnames="graphdef")
def next_logits(
    graphdef: nnx.GraphDef[Policy], state: nnx.State[str, object], batch: dict[str, Array]
) -> Float[Array, "B V"]:
    """Scores after the last real token of each sequence, by the policy's own forward pass.

    `batch` is as for `policy_activations`, with ``image_embeds`` [I*M, D] instead of patches.
    """
    policy: Policy = nnx.merge(graphdef, state)
    hidden = policy.hidden_states(
        *(batch["tokens"], batch["positions"], batch["lengths"]),
        *(batch["image_rows"], batch["image_embeds"]),
    )
    last = batch["lengths"] - 1
    return policy.text.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
