"""The decode loop with its caches in the order in memory that its products read them in.

XLA for TPU chooses that order by the numbers of rows and columns. Arguments in another one it
copies whole, all of K and V, before and after the loop, in every call: twice the caches in
temporaries. So the order is read from the loop compiled with free layouts, the caches are brought
into it once for each size, and the loop that runs takes and returns them so. Elsewhere arrays lie
as their axes say.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Hashable
from typing import TypeAlias

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jax.stages import Wrapped
from jaxtyping import Array, PyTree

from speciarl_jax.policy.model import Policy
from speciarl_jax.rollout import decode
from speciarl_jax.rollout.cache import Cache
from speciarl_jax.rollout.decode import DecodeState
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling

# Axes of each array of the own caches from the slowest to the fastest.
Orders: TypeAlias = tuple[tuple[int, ...], ...]
_plain = inspect.unwrap(decode.decode_chunk)
_known: dict[Hashable, Orders] = {}
_order_of = operator.attrgetter("format.layout.major_to_minor")
_STATE = 3  # its place among the arrays of a call: states, prompts, rows, state, ...


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is static in a call of the decode loop."""

    graphdef: nnx.GraphDef[Policy]
    sampling: Sampling
    placement: Placement


def decode_chunk(graphdef: nnx.GraphDef[Policy], *call: PyTree) -> DecodeState:
    """`decode.decode_chunk` with its arguments, caches in the loop's own order where it has one."""
    *arrays, sampling, placement = call
    if not placement.orders_caches:
        plain: DecodeState = decode.decode_chunk(graphdef, *call)
        return plain
    orders = wanted(Loop(graphdef, sampling, placement), *arrays)
    state = arrays[_STATE]
    arrays[_STATE] = dataclasses.replace(state, own=in_order(state.own, orders))
    places, tree = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state.own))
    function = program(orders, tuple(places), tree)
    advanced: DecodeState = function(graphdef, *arrays, sampling, placement)
    return advanced


def wanted(loop: Loop, *arrays: PyTree) -> Orders:
    """The orders that the loop's caches have if XLA may choose; compiled once for each size."""
    leaves, tree = jax.tree.flatten(arrays)
    key = (loop, tree, tuple((x.shape, str(x.dtype)) for x in leaves))
    if key not in _known:
        _known[key] = _read(loop, jax.tree.map(_abstract, arrays))
    return _known[key]


def _abstract(x: PyTree) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _read(loop: Loop, arrays: tuple[PyTree, ...]) -> Orders:
    """Compiles the loop with its caches in any order, donated alone: XLA confuses what else is."""
    places = list(jax.tree.map(lambda x: x.sharding, arrays))
    bare = list(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    free = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), arrays[_STATE].own)
    own, state = bare[_STATE].own, dataclasses.replace(places[_STATE], own=free)
    bare[_STATE] = dataclasses.replace(bare[_STATE], own=())
    places[_STATE] = dataclasses.replace(places[_STATE], own=())

    def call(own: Cache, *arrays: PyTree) -> DecodeState:
        given = list(arrays)
        given[_STATE] = dataclasses.replace(given[_STATE], own=own)
        advanced: DecodeState = _plain(loop.graphdef, *given, loop.sampling, loop.placement)
        return advanced

    function = jax.jit(call, in_shardings=(free, *places), out_shardings=state, donate_argnums=0)
    chosen = function.lower(own, *bare).compile().input_formats[0][0]
    return tuple(one.layout.major_to_minor for one in jax.tree.leaves(chosen))


@functools.cache
def program(orders: Orders, places: tuple[Sharding, ...], tree: jax.tree_util.PyTreeDef) -> Wrapped:
    """The loop that takes and returns own caches in `orders`, each array at its place."""
    own = jax.tree.unflatten(
        tree, [Format(Layout(o), p) for o, p in zip(orders, places, strict=True)]
    )
    fields: dict[str, PyTree] = dict.fromkeys(x.name for x in dataclasses.fields(DecodeState))
    out = DecodeState(**(fields | {"own": own}))
    return jax.jit(
        _plain,
        static_argnames=("graphdef", "sampling", "placement"),
        donate_argnames=("state",),
        out_shardings=out,
    )


def in_order(own: Cache, orders: Orders) -> Cache:
    """The same cache in `orders`: moved array by array, each giving its memory up."""
    arrays, tree = jax.tree.flatten(own)
    pairs = zip(arrays, orders, strict=True)
    moved: Cache = jax.tree.unflatten(tree, [_moved(x, order) for x, order in pairs])
    return moved


def _moved(x: Array, order: tuple[int, ...]) -> Array:
    if _order_of(x) == order:
        return x
    moved: Array = _mover(Format(Layout(order), x.sharding))(x)
    return moved


@functools.cache
def _mover(place: Format) -> Wrapped:
    return jax.jit(lambda x: x, out_shardings=place, donate_argnums=0)
