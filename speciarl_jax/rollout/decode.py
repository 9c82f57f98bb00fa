"""Device programs of a rollout: prefill a prompt once, decode many answers against it.

Rows are flat: row r answers prompt `row_prompt[r]`. Prompt keys and values exist once per prompt;
their attention gathers the queries of a prompt's rows into [P, slots], so each prompt's cache is
read once per step, not once per row:

    queries [R, H, A] --slot_rows--> [P, slots, H, A] x prompt KV [P, S, K, A]  (peak, sum, output)
    queries [R, H, A] -------------------------------- x own KV    [R, C, K, A]  (peak, sum, output)
                                                       joined in float32 by their softmax statistics
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.policy.attention import attend, causal_mask
from speciarl_jax.policy.rope import text_angles
from speciarl_jax.policy.text import TextModel
from speciarl_jax.rollout.sampling import Sampling, allowed_logits, sample_tokens

_MASKED = np.float32(-1e30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptCache:
    """What decoding reads of the prompts and never changes.

    Attributes:
        k, v: [L, P, S, K, A] rotated keys, values.
        lengths: [P] real prompt tokens.
        last_hidden: [P, D] final state of each prompt's last token; it predicts token 0.
        next_position: [P] M-RoPE id of completion token 0.
    """

    k: Array
    v: Array
    lengths: Array
    last_hidden: Array
    next_position: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap:
    """Which row answers which prompt.

    Attributes:
        row_prompt: [R] prompt of each row.
        row_slot: [R] position of the row in the flattened [P * slots] grid.
        slot_rows: [P, slots] row of each slot; empty slots repeat row 0 and are discarded.
        keys: [R] random keys, one per rollout.
    """

    row_prompt: Array
    row_slot: Array
    slot_rows: Array
    keys: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What decoding updates in place (donated).

    Attributes:
        k, v: [L, R, C, K, A] own caches; column c belongs to completion token c.
        hidden: [R, D] state that predicts the next token.
        tokens, logprobs: [R, C] sampled so far; 0 past a row's length.
        lengths: [R] completion tokens, the stop token included.
        is_done: [R] the row has stopped, or is padding.
        step: [] number of tokens decoded, the same for all rows.
    """

    k: Array
    v: Array
    hidden: Array
    tokens: Array
    logprobs: Array
    lengths: Array
    is_done: Array
    step: Array


def prefill(
    text: TextModel,
    tokens: Int[Array, "P S"],
    positions: Int[Array, "P 3 S"],
    lengths: Int[Array, " P"],
    position_deltas: Int[Array, " P"],
    image_rows: Int[Array, "P S"],
    image_embeds: Float[Array, "IM D"],
) -> PromptCache:
    """Runs each prompt once and keeps its keys and values.

    Args:
        text: the language model.
        tokens, positions, lengths, position_deltas, image_rows: see `types.PromptBatch`.
        image_embeds: the encoder's table of merged tokens.
    """
    mask = causal_mask(lengths, tokens.shape[1])

    def attend_fn(q: Array, k: Array, v: Array, layer: Array, carry: None) -> Any:
        return attend(q, k, v, mask), carry, (k, v)

    hidden = text.embed(tokens, image_rows, image_embeds)
    hidden, _, (k, v) = text.run(hidden, positions, attend_fn)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return PromptCache(k, v, lengths, last_hidden, lengths + position_deltas)


def start_decoding(
    cache: PromptCache, rows: RowMap, is_padding: Bool[Array, " R"], num_columns: int
) -> DecodeState:
    """Forks every prompt into its rows with empty own caches of `num_columns` tokens."""
    num_rows = rows.row_prompt.shape[0]
    layers, _, _, kv_heads, head_dim = cache.k.shape
    own = (layers, num_rows, num_columns, kv_heads, head_dim)
    return DecodeState(
        k=jnp.zeros(own, cache.k.dtype),
        v=jnp.zeros(own, cache.v.dtype),
        hidden=jnp.take(cache.last_hidden, rows.row_prompt, axis=0),
        tokens=jnp.zeros((num_rows, num_columns), jnp.int32),
        logprobs=jnp.zeros((num_rows, num_columns), jnp.float32),
        lengths=jnp.zeros((num_rows,), jnp.int32),
        is_done=is_padding,
        step=jnp.zeros((), jnp.int32),
    )


def decode_chunk(
    text: TextModel,
    cache: PromptCache,
    rows: RowMap,
    state: DecodeState,
    stop_ids: Int[Array, " stops"],
    banned: Bool[Array, " V"],
    until: Int[Array, ""],
    sampling: Sampling,
) -> DecodeState:
    """Decodes until step `until`, or until every row has stopped.

    Args:
        text: the language model.
        cache: the prompts' part.
        rows: row to prompt maps.
        state: donated; comes back advanced.
        stop_ids: a sampled stop id is kept and ends its row.
        banned: ids that are never sampled.
        until: step at which to look up; at most the own cache's columns.
        sampling: options, static.
    """
    next_position = jnp.take(cache.next_position, rows.row_prompt)

    def is_unfinished(state: DecodeState) -> Array:
        return (state.step < until) & ~jnp.all(state.is_done)

    def advance(state: DecodeState) -> DecodeState:
        tokens, logprobs = _sample_step(text, rows, state, banned, sampling)
        live = ~state.is_done
        tokens = jnp.where(live, tokens, 0)
        column = (0, state.step)
        state = dataclasses.replace(
            state,
            tokens=_write(state.tokens, tokens[:, None], column),
            logprobs=_write(state.logprobs, jnp.where(live, logprobs, 0)[:, None], column),
            lengths=state.lengths + live,
            is_done=state.is_done | (jnp.isin(tokens, stop_ids) & live),
        )
        hidden, k, v = _forward_step(text, cache, rows, state, tokens, next_position + state.step)
        return dataclasses.replace(state, hidden=hidden, k=k, v=v, step=state.step + 1)

    return jax.lax.while_loop(is_unfinished, advance, state)


def _write(buffer: Array, values: Array, start: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(buffer, values, start)


def _sample_step(
    text: TextModel, rows: RowMap, state: DecodeState, banned: Array, sampling: Sampling
) -> tuple[Array, Array]:
    logits = allowed_logits(text.logits(state.hidden), banned, sampling.temperature)
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(
        rows.keys
    )
    seen = None
    if sampling.repetition_penalty != 1:
        is_written = jnp.arange(state.tokens.shape[1])[None] < state.lengths[:, None]
        seen = jnp.zeros(logits.shape, bool)
        row_index = jnp.arange(logits.shape[0])[:, None]
        seen = seen.at[row_index, state.tokens].max(is_written)
    return sample_tokens(logits, uniforms, sampling, seen)


def _forward_step(
    text: TextModel,
    cache: PromptCache,
    rows: RowMap,
    state: DecodeState,
    tokens: Int[Array, " R"],
    position: Int[Array, " R"],
) -> tuple[Array, Array, Array]:
    """One token per row through all layers; own caches are written at column `step`."""
    positions = jnp.broadcast_to(position[:, None, None], (tokens.shape[0], 3, 1))
    angles = text_angles(positions, text.arch)[:, 0]  # [R, A/2]
    prompt_mask = jnp.arange(cache.k.shape[2])[None] < cache.lengths[:, None]  # [P, S]
    own_mask = jnp.arange(state.k.shape[2]) <= state.step  # [C]

    def attend_fn(q: Array, k: Array, v: Array, layer: Array, own: tuple[Array, Array]) -> Any:
        start = (layer, 0, state.step, 0, 0)
        own_k, own_v = (
            _write(own[0], k[None, :, None], start),
            _write(own[1], v[None, :, None], start),
        )
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [R, K, rep, A]
        parts = (
            _prompt_part(
                grouped, _layer(cache.k, layer), _layer(cache.v, layer), rows, prompt_mask
            ),
            _own_part(grouped, _layer(own_k, layer), _layer(own_v, layer), own_mask),
        )
        return _join(parts).astype(q.dtype).reshape(q.shape), (own_k, own_v), None

    hidden = text.embed(tokens)
    hidden, (k, v), _ = text.run(hidden, None, attend_fn, (state.k, state.v), angles=angles)
    return hidden, k, v


def _layer(stacked: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)


# (output before division [R, K, rep, A], peak score [R, K, rep], sum of exponentials), float32
_Part = tuple[Array, Array, Array]


def _prompt_part(
    q: Float[Array, "R K rep A"],
    k: Float[Array, "P S K A"],
    v: Float[Array, "P S K A"],
    rows: RowMap,
    mask: Bool[Array, "P S"],
) -> _Part:
    num_prompts, slots = rows.slot_rows.shape
    kv_heads, rep, head_dim = q.shape[1:]
    gathered = jnp.take(q, rows.slot_rows.reshape(-1), axis=0)
    gathered = gathered.reshape(num_prompts, slots, kv_heads, rep, head_dim)
    gathered = gathered.transpose(0, 2, 1, 3, 4).reshape(num_prompts, kv_heads, -1, head_dim)
    out, peak, total = _partial_softmax(gathered, k, v, mask[:, None, None])

    def scatter(x: Array) -> Array:
        x = x.reshape(num_prompts, kv_heads, slots, rep, *x.shape[3:])
        x = jnp.moveaxis(x, 2, 1).reshape(num_prompts * slots, kv_heads, rep, *x.shape[4:])
        return jnp.take(x, rows.row_slot, axis=0)

    return scatter(out), scatter(peak), scatter(total)


def _own_part(
    q: Float[Array, "R K rep A"],
    k: Float[Array, "R C K A"],
    v: Float[Array, "R C K A"],
    mask: Bool[Array, " C"],
) -> _Part:
    return _partial_softmax(q, k, v, mask[None, None, None])


def _partial_softmax(q: Array, k: Array, v: Array, mask: Array) -> _Part:
    """Unnormalised attention of q [X, K, Q, A] over k, v [X, T, K, A], float32 statistics."""
    scores = jnp.einsum("xkqa,xtka->xkqt", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * np.float32(q.shape[-1] ** -0.5), _MASKED)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    out = jnp.einsum(
        "xkqt,xtka->xkqa", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out, peak, jnp.sum(weights, axis=-1)


def _join(parts: tuple[_Part, ...]) -> Array:
    """Softmax over the union of the parts' keys."""
    peak = jnp.max(jnp.stack([part[1] for part in parts]), axis=0)
    scales = [jnp.exp(part[1] - peak) for part in parts]
    total = sum(part[2] * scale for part, scale in zip(parts, scales, strict=True))
    out = sum(part[0] * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return out / total[..., None]


def compact(state: DecodeState, keep: Int[Array, " R2"], num_columns: int) -> DecodeState:
    """Keeps the rows `keep` (live ones and fillers) in caches of `num_columns` columns."""

    def take(x: Array) -> Array:
        return jnp.take(x, keep, axis=0)

    def resize(x: Array, axis: int) -> Array:
        extra = num_columns - x.shape[axis]
        if extra <= 0:
            return jax.lax.slice_in_dim(x, 0, num_columns, axis=axis)
        pad = [(0, extra if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, pad)

    return DecodeState(
        k=resize(jnp.take(state.k, keep, axis=1), 2),
        v=resize(jnp.take(state.v, keep, axis=1), 2),
        hidden=take(state.hidden),
        tokens=resize(take(state.tokens), 1),
        logprobs=resize(take(state.logprobs), 1),
        lengths=take(state.lengths),
        is_done=take(state.is_done),
        step=state.step,
    )


def merge_text(graphdef: nnx.GraphDef, *states: nnx.State) -> TextModel:
    """The language model of a policy taken apart."""
    return nnx.merge(graphdef, *states).text
