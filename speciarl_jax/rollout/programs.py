"""The jitted programs of a rollout; what is static, what is donated.

The engine and the warm-up call these and nothing else, so what the warm-up has compiled is what a
run uses.
"""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jaxtyping import Array

from speciarl_jax.rollout import decode
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling, row_keys


@functools.partial(jax.jit, static_argnames=("graphdef", "is_int8", "placement"))
def prefill(
    graphdef: nnx.GraphDef, states: tuple, *arrays: Array, is_int8: bool, placement: Placement
) -> decode.PromptCache:
    """See `decode.prefill`."""
    text = decode.merge_text(graphdef, *states)
    return decode.prefill(text, *arrays, is_int8, placement)


@functools.partial(jax.jit, static_argnames=("num_columns", "placement"))
def start(
    prompts: decode.PromptCache,
    rows: decode.RowMap,
    keys: Array,
    is_padding: Array,
    num_columns: int,
    placement: Placement,
) -> decode.DecodeState:
    """See `decode.start_decoding`."""
    return decode.start_decoding(prompts, rows, keys, is_padding, num_columns, placement)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "sampling", "placement"), donate_argnames=("state",)
)
def decode_chunk(
    graphdef: nnx.GraphDef,
    states: tuple,
    prompts: decode.PromptCache,
    rows: decode.RowMap,
    state: decode.DecodeState,
    is_done: Array,
    stop_ids: Array,
    banned: Array,
    until: Array,
    enough: Array,
    sampling: Sampling,
    placement: Placement,
) -> decode.DecodeState:
    """See `decode.decode_chunk`."""
    text = decode.merge_text(graphdef, *states)
    return decode.decode_chunk(
        text, prompts, rows, state, is_done, stop_ids, banned, until, enough, sampling, placement
    )


@functools.partial(jax.jit, static_argnames="placement")
def shrink(state: decode.DecodeState, keep: Array, placement: Placement) -> decode.DecodeState:
    """See `decode.shrink`."""
    return decode.shrink(state, keep, placement)


@functools.partial(jax.jit, static_argnames=("num_columns", "placement"))
def widen(state: decode.DecodeState, num_columns: int, placement: Placement) -> decode.DecodeState:
    """See `decode.widen`."""
    return decode.widen(state, num_columns, placement)


@functools.partial(jax.jit, static_argnames=("seed", "placement"))
def keys_of_rows(
    seed: int, step: Array, prompt_index: Array, sample_index: Array, placement: Placement
) -> Array:
    """Data [R, 2] of one random key per rollout, see `sampling.row_keys`."""
    keys = row_keys(seed, step, prompt_index, sample_index)
    return placement.rows(jax.random.key_data(keys))
