"""Device programs of a rollout: prefill a prompt once, decode many answers against it.

Rows are flat: row r answers prompt `row_prompt[r]`. Prompt keys and values exist once per prompt;
their attention gathers the queries of a prompt's rows into [P, slots], so each prompt's cache is
read once per step, not once per row:

    queries [R, H, A] --slot_rows--> [P, slots, H, A] x prompt KV [P, K, S, A]  (peak, sum, output)
    queries [R, H, A] -------------------------------- x own KV    [R, K, C, A]  (peak, sum, output)
                                                       joined in float32 by their softmax statistics

On a mesh, prompts and rows are blocks, one per shard; see `speciarl_jax.rollout.placement`. Engine
and warm-up call the jitted functions here and nothing else, so what the warm-up has compiled is
what a run uses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from speciarl_jax.devices.layout import Leaf, Params
from speciarl_jax.policy.flash import attend_causal
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.rope import text_angles
from speciarl_jax.policy.text import TextModel
from speciarl_jax.policy.vocabulary import allowed_logits
from speciarl_jax.rollout import cache
from speciarl_jax.rollout.cache import KeyValues, Part
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling, row_keys, sample_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptCache(Generic[Leaf]):
    """What decoding reads of the prompts and never changes.

    Attributes:
        kv: rotated keys, values of P prompts.
        lengths: [P] real prompt tokens.
        last_hidden: [P, D] final state of each prompt's last token; it predicts token 0.
        next_position: [P] M-RoPE id of completion token 0.
    """

    kv: cache.Cache[Leaf]
    lengths: Leaf
    last_hidden: Leaf
    next_position: Leaf

    @property
    def num_tokens(self: PromptCache) -> int:
        """S."""
        return cache.shape_of(self.kv)[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap(Generic[Leaf]):
    """Which row answers which prompt; indices count from the start of a shard's block.

    Attributes:
        row_prompt: [R] prompt of each row.
        row_slot: [R] position of the row in the flattened [P * slots] grid.
        slot_rows: [P, slots] row of each slot; empty slots repeat row 0 and are discarded.
    """

    row_prompt: Leaf
    row_slot: Leaf
    slot_rows: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState(Generic[Leaf]):
    """What decoding updates in place (donated).

    Attributes:
        own: caches of R rows and C tokens; column c belongs to completion token c.
        hidden: [R, D] state that predicts the next token.
        completion_tokens, logprobs: [R, C] sampled so far; 0 past a row's length.
        lengths: [R] completion tokens, the stop token included.
        is_done: [R] the row has stopped, or is padding.
        keys: [R, 2] uint32, data of one random key per rollout.
        step: [] number of tokens decoded, the same for all rows.
    """

    own: cache.Cache[Leaf]
    hidden: Leaf
    completion_tokens: Leaf
    logprobs: Leaf
    lengths: Leaf
    is_done: Leaf
    keys: Leaf
    step: Leaf

    @property
    def num_columns(self: DecodeState) -> int:
        """C."""
        return self.completion_tokens.shape[1]


@functools.partial(jax.jit, static_argnames=("graphdef", "is_int8", "placement"))
def prefill(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    tokens: Int[Array, "P S"],
    positions: Int[Array, "P 3 S"],
    lengths: Int[Array, " P"],
    position_deltas: Int[Array, " P"],
    image_rows: Int[Array, "P S"],
    image_embeds: Float[Array, "IM D"],
    *,
    is_int8: bool,
    placement: Placement,
) -> PromptCache:
    """Runs each prompt once and keeps its keys and values.

    Args:
        graphdef, states: the policy taken apart.
        tokens, positions, lengths, position_deltas: see `data.batch.PromptBatch`.
        image_rows: as there, but counted from the start of the shard's block of the table.
        image_embeds: the encoder's table of merged tokens.
        is_int8: store the cache in int8; the prompt itself attends exactly.
        placement: where prompts live.
    """
    text = merge_text(graphdef, *states)

    def attend_fn(
        q: Array, k: Array, v: Array, layer: Array | int, carry: None
    ) -> tuple[Array, None, KeyValues]:
        out = attend_causal(q, k, v, lengths, placement.mesh)
        return out, None, cache.store(cache.pack(k, v, is_int8))

    hidden = placement.embed(text, tokens, image_rows, image_embeds)
    hidden, _, kv = text.run(hidden, text_angles(positions, text.arch), attend_fn, None)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return PromptCache(
        cache.pin(cache.by_layer(kv) if placement.is_unrolled else kv, placement),
        placement.rows(lengths),
        placement.rows(last_hidden),
        placement.rows(lengths + position_deltas),
    )


@functools.partial(jax.jit, static_argnames=("num_columns", "placement"))
def start(
    prompts: PromptCache,
    rows: RowMap,
    keys: Array,
    is_padding: Bool[Array, " R"],
    num_columns: int,
    placement: Placement,
) -> DecodeState:
    """Forks every prompt into its rows with empty own caches of `num_columns` tokens."""
    num_rows = rows.row_prompt.shape[0]
    layers, _, kv_heads, _, head_dim = cache.shape_of(prompts.kv)
    own = (layers, num_rows, kv_heads, num_columns, head_dim)
    dtype = jax.tree.leaves(prompts.kv)[0].dtype
    state = DecodeState(
        own=cache.empty(own, dtype, placement),
        hidden=placement.take(prompts.last_hidden, rows.row_prompt),
        completion_tokens=jnp.zeros((num_rows, num_columns), jnp.int32),
        logprobs=jnp.zeros((num_rows, num_columns), jnp.float32),
        lengths=jnp.zeros((num_rows,), jnp.int32),
        is_done=is_padding,
        keys=keys,
        step=jnp.zeros((), jnp.int32),
    )
    return _pin(state, placement)


def _pin(state: DecodeState, placement: Placement) -> DecodeState:
    """Rows on their shards, heads over the tensor axis: the layout every program keeps."""
    pinned = map_rows(placement.rows, state)
    return dataclasses.replace(pinned, own=cache.pin(state.own, placement))


def map_rows(function: Callable[[Leaf], Leaf], state: DecodeState[Leaf]) -> DecodeState[Leaf]:
    """`function` of every array of rows; the caches stay as they are."""
    return dataclasses.replace(
        state,
        hidden=function(state.hidden),
        completion_tokens=function(state.completion_tokens),
        logprobs=function(state.logprobs),
        lengths=function(state.lengths),
        is_done=function(state.is_done),
        keys=function(state.keys),
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "sampling", "placement"), donate_argnames=("state",)
)
def decode_chunk(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    prompts: PromptCache,
    rows: RowMap,
    state: DecodeState,
    is_done: Bool[Array, " R"],
    stop_ids: Int[Array, " stops"],
    banned: Bool[Array, " V"],
    until: Int[Array, ""],
    enough: Int[Array, ""],
    sampling: Sampling,
    placement: Placement,
) -> DecodeState:
    """Decodes until step `until`, or until no shard has more than `enough` unfinished rows.

    Without `Placement.has_early_exit` always until `until`.

    Args:
        graphdef, states, prompts, rows, sampling, placement: of the wave.
        state: donated; comes back advanced.
        is_done: rows that are not decoded further: the host's own view, stop strings included.
        stop_ids: a sampled stop id is kept and ends its row.
        banned: ids that are never sampled.
        until: step at which to look up; at most the own cache's columns.
        enough: rows of a smaller batch that the host would move to; 0 to finish all.
    """
    text = merge_text(graphdef, *states)
    next_position = placement.take(prompts.next_position, rows.row_prompt)
    layers = text.unstacked() if placement.is_unrolled else None

    def is_unfinished(state: DecodeState) -> Array:
        if not placement.has_early_exit:
            return state.step < until
        live = (~state.is_done).reshape(placement.num_shards, -1)
        return (state.step < until) & jnp.any(jnp.sum(live, axis=1) > enough)

    def advance(state: DecodeState) -> DecodeState:
        tokens, logprobs = _sample_step(text, state, banned, sampling, placement)
        live = ~state.is_done
        tokens = jnp.where(live, tokens, 0)
        state = dataclasses.replace(
            state,
            completion_tokens=_write_column(state.completion_tokens, tokens, state.step),
            logprobs=_write_column(state.logprobs, jnp.where(live, logprobs, 0), state.step),
            lengths=state.lengths + live,
            is_done=state.is_done | (jnp.isin(tokens, stop_ids) & live),
        )
        position = next_position + state.step
        hidden, own = _forward_step(text, layers, prompts, rows, state, tokens, position, placement)
        state = dataclasses.replace(state, hidden=hidden, own=own, step=state.step + 1)
        return _pin(state, placement)

    state = _pin(dataclasses.replace(state, is_done=is_done), placement)
    return jax.lax.while_loop(is_unfinished, advance, state)


def _write_column(buffer: Array, values: Array, column: Array) -> Array:
    return jax.lax.dynamic_update_slice(buffer, values[:, None], (0, column))


def _sample_step(
    text: TextModel, state: DecodeState, banned: Array, sampling: Sampling, placement: Placement
) -> tuple[Array, Array]:
    logits = placement.logits(text.logits(state.hidden))
    logits = allowed_logits(logits, banned, sampling.temperature)
    keys = jax.random.wrap_key_data(placement.spread(state.keys))
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(keys)
    seen = None
    if sampling.repetition_penalty != 1:
        lengths = placement.spread(state.lengths)
        is_written = jnp.arange(state.num_columns)[None] < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool)
        row_index = jnp.arange(logits.shape[0])[:, None]
        seen = seen.at[row_index, placement.spread(state.completion_tokens)].max(is_written)
    tokens, logprobs = sample_tokens(logits, uniforms, sampling, seen)
    num_rows = state.hidden.shape[0]
    return placement.joined(tokens, num_rows), placement.joined(logprobs, num_rows)


def _forward_step(
    text: TextModel,
    layers: list[Params] | None,
    prompts: PromptCache,
    rows: RowMap,
    state: DecodeState,
    tokens: Int[Array, " R"],
    position: Int[Array, " R"],
    placement: Placement,
) -> tuple[Array, cache.Cache]:
    """One token per row through all layers; own caches are written at column `step`."""
    positions = jnp.broadcast_to(position[:, None, None], (tokens.shape[0], 3, 1))
    angles = text_angles(positions, text.arch)[:, 0]  # [R, A/2]
    prompt_mask = jnp.arange(prompts.num_tokens)[None] < prompts.lengths[:, None]  # [P, S]
    own_mask = (jnp.arange(state.num_columns) <= state.step)[None, None, None]  # [1, 1, 1, C]

    def attend_fn(
        q: Array, k: Array, v: Array, layer: Array | int, own: cache.Cache
    ) -> tuple[Array, cache.Cache, None]:
        own = cache.write(own, cache.pack(k, v, cache.is_int8(own)), layer, state.step)
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [R, K, rep, A]
        parts = (
            _prompt_part(grouped, cache.one_layer(prompts.kv, layer), rows, prompt_mask, placement),
            cache.partial_softmax(grouped, cache.one_layer(own, layer), own_mask),
        )
        return cache.join(parts).astype(q.dtype).reshape(q.shape), own, None

    hidden = text.embed(tokens)
    if layers is not None:
        return text.run_unstacked(layers, hidden, angles, attend_fn, state.own)
    hidden, own, _ = text.run(hidden, angles, attend_fn, state.own)
    return hidden, own


def _prompt_part(
    q: Float[Array, "R K rep A"],
    kv: KeyValues,
    rows: RowMap,
    mask: Bool[Array, "P S"],
    placement: Placement,
) -> Part:
    num_prompts, slots = rows.slot_rows.shape
    kv_heads, rep, head_dim = q.shape[1:]
    gathered = placement.take(q, rows.slot_rows.reshape(-1))
    gathered = gathered.reshape(num_prompts, slots, kv_heads, rep, head_dim)
    gathered = gathered.transpose(0, 2, 1, 3, 4).reshape(num_prompts, kv_heads, -1, head_dim)
    out, peak, total = cache.partial_softmax(gathered, kv, mask[:, None, None])

    def scatter(x: Array) -> Array:
        x = x.reshape(num_prompts, kv_heads, slots, rep, *x.shape[3:])
        x = jnp.moveaxis(x, 2, 1).reshape(num_prompts * slots, kv_heads, rep, *x.shape[4:])
        return placement.take(x, rows.row_slot)

    return scatter(out), scatter(peak), scatter(total)


@functools.partial(jax.jit, static_argnames="placement")
def shrink(state: DecodeState, keep: Int[Array, " R2"], placement: Placement) -> DecodeState:
    """Keeps the rows `keep` (live ones and fillers), counted within each shard's block."""
    small = map_rows(lambda x: placement.take(x, keep), state)
    own = cache.take_rows(state.own, keep, placement)
    return _pin(dataclasses.replace(small, own=own), placement)


@functools.partial(jax.jit, static_argnames=("num_columns", "placement"))
def widen(state: DecodeState, num_columns: int, placement: Placement) -> DecodeState:
    """The same rows with room for `num_columns` tokens."""
    extra = ((0, 0), (0, num_columns - state.num_columns))
    wide = dataclasses.replace(
        state,
        own=cache.resize_columns(state.own, num_columns),
        completion_tokens=jnp.pad(state.completion_tokens, extra),
        logprobs=jnp.pad(state.logprobs, extra),
    )
    return _pin(wide, placement)


@functools.partial(jax.jit, static_argnames=("seed", "placement"))
def keys_of_rows(
    seed: int,
    step: Int[Array, ""],
    prompt_index: Int[Array, " R"],
    sample_index: Int[Array, " R"],
    placement: Placement,
) -> UInt32[Array, "R 2"]:
    """Data of one random key per rollout, see `sampling.row_keys`."""
    keys = row_keys(seed, step, prompt_index, sample_index)
    return placement.rows(jax.random.key_data(keys))


def merge_text(graphdef: nnx.GraphDef[Policy], *states: Params) -> TextModel:
    """The language model of a policy taken apart."""
    return nnx.merge(graphdef, *states).text
