"""Our activations, component by component, under names that the parity report shares with torch.

One scan over the layers whose body also returns its output: compile time does not grow with depth.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.policy.attention import attend, causal_mask
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.rope import text_angles, vision_angles
from speciarl_jax.policy.text import TextModel
from speciarl_jax.policy.vision import VisionTower

PATCH_EMBED = "vision/patch_embed"
VISION_BLOCKS = "vision/block"
MERGER = "vision/merger"
EMBEDDING = "text/embedding"
DECODER_LAYERS = "text/layer"
FINAL_NORM = "text/norm"
LOGITS = "text/logits"


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
    graphdef, states = nnx.split(tower.blocks)
    is_full = np.isin(np.arange(tower.arch.depth), tower.arch.full_attention_blocks)

    def body(hidden: Array, layer: tuple[nnx.State[str, object], Array]) -> tuple[Array, Array]:
        hidden = nnx.merge(graphdef, layer[0])(hidden, angles, mask, layer[1])
        return hidden, hidden

    embedded = tower.patch_embed(patches)
    hidden, blocks = jax.lax.scan(body, embedded, (states, jnp.asarray(is_full)))
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
    graphdef, states = nnx.split(text.blocks)

    def attend_fn(
        q: Array, k: Array, v: Array, layer: Array | int, carry: None
    ) -> tuple[Array, None, None]:
        return attend(q, k, v, mask), carry, None

    def body(hidden: Array, layer: tuple[nnx.State[str, object], Array]) -> tuple[Array, Array]:
        block = nnx.merge(graphdef, layer[0])
        hidden = block(hidden, angles, attend_fn, layer[1], None)[0]
        return hidden, hidden

    last, layers = jax.lax.scan(body, hidden, (states, jnp.arange(text.arch.num_layers)))
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

    Args:
        graphdef: of the policy, ``nnx.split(policy)``.
        state: of the policy.
        batch: ``tokens`` [B, T], ``positions`` [B, 3, T], ``lengths`` [B], ``image_rows`` [B, T],
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

    Args:
        graphdef: of the policy, ``nnx.split(policy)``.
        state: of the policy.
        batch: as for `policy_activations`, with ``image_embeds`` [I*M, D] instead of patches.
    """
    policy: Policy = nnx.merge(graphdef, state)
    hidden = policy.hidden_states(
        batch["tokens"],
        batch["positions"],
        batch["lengths"],
        batch["image_rows"],
        batch["image_embeds"],
    )
    last = batch["lengths"] - 1
    return policy.text.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
