"""Every jitted program of a step, with the shapes and places of its arguments; allocates nothing.

    encode -> prefill -> decode (shrink when rows have finished) -> old and reference log-probs
    -> update

The functions are those that a run calls; here they meet ShapeDtypeStructs instead of arrays, laid
out as `devices.layout` says. Sampling programs run on `AbstractSession.local`, the others on the
whole mesh. Rollout and update share one layout, so no program moves weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, Sharding
from jax.stages import Lowered
from jax.typing import DTypeLike
from jaxtyping import PyTree

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config
from speciarl_jax.devices.layout import (
    Params,
    cache_sharding,
    image_sharding,
    prompt_sharding,
    replicated,
)
from speciarl_jax.devices.mesh import local_mesh
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch, TreeBatch, batch_logprobs
from speciarl_jax.learner.opening import abstract_optim, abstract_parts, place_shapes
from speciarl_jax.learner.optimizer import OptimState, make_optimizer
from speciarl_jax.learner.update import update_step
from speciarl_jax.plan.shapes import StepShapes, rollout_shape
from speciarl_jax.policy.model import PolicyParts, encode_images
from speciarl_jax.rollout import decode, layout, memory, order
from speciarl_jax.rollout.decode import DecodeState, PromptCache, RowMap, map_rows
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import training_sampling

Abstract: TypeAlias = PyTree[jax.ShapeDtypeStruct]


@runtime_checkable
class Jitted(Protocol):
    """The part of a jitted function that a plan needs."""

    def lower(self, *args: object, **kwargs: object) -> Lowered:
        """Traces it for the devices of its arguments."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One call of a jitted function, with static values and ShapeDtypeStructs with shardings.

    `others` is what else is alive on the devices meanwhile.
    """

    name: str
    function: Jitted
    args: tuple[object, ...]
    kwargs: dict[str, object] = dataclasses.field(default_factory=dict)
    others: tuple[Abstract, ...] = ()

    def lower(self) -> Lowered:
        """Traces it for the devices of its arguments."""
        return self.function.lower(*self.args, **self.kwargs)


@dataclasses.dataclass(frozen=True)
class AbstractSession:
    """A session without arrays: what `speciarl_jax.run.session.Session` opens, by shape.

    Attributes:
        mesh, local: devices of the job, and those that one sampling program spans.
        parts: the policy; `trainable` and `frozen` are laid out on `mesh`.
        optimizer: the run's; jit compares it by identity.
        optim: its state.
    """

    config: Config
    arch: Arch
    mesh: Mesh
    local: Mesh
    parts: PolicyParts
    optimizer: optax.GradientTransformation
    optim: OptimState

    @property
    def states(self) -> tuple[Params, Params]:
        """(trainable, frozen) as one process sees them."""
        parts, local = self.parts, self.local
        return place_shapes(parts.trainable, local), place_shapes(parts.frozen, local)


def abstract_session(
    config: Config, arch: Arch, mesh: Mesh, local: Mesh | None = None
) -> AbstractSession:
    """Shapes and places of policy and optimiser; `local` is that of process 0 unless given."""
    parts = abstract_parts(config, arch, mesh)
    optimizer = make_optimizer(config.optim, config.num_updates)
    optim = abstract_optim(optimizer, parts.trainable, mesh)
    local = local or local_mesh(mesh)
    return AbstractSession(config, arch, mesh, local, parts, optimizer, optim)


def _array(shape: tuple[int, ...], dtype: DTypeLike, place: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)


def device_bytes(tree: PyTree) -> int:
    """Bytes that the arrays of a tree take on one device; static values take none."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def step_programs(session: AbstractSession, shapes: StepShapes) -> list[Program]:
    """The programs of one step at one set of shapes, in the order of the step."""
    return [
        encode_program(session, shapes),
        prefill_program(session, shapes),
        *decode_programs(session, shapes),
        *learning_programs(session, shapes),
    ]


def encode_program(session: AbstractSession, shapes: StepShapes) -> Program:
    """The vision tower over one process's images."""
    place = image_sharding(session.local, shapes.host_prompts)
    images = _images(session, shapes, (shapes.host_prompts,), place)
    args = (session.parts.graphdef, session.states, *images, session.local)
    return Program("encode", encode_images, args, others=(session.optim,))


def _images(
    session: AbstractSession, shapes: StepShapes, lead: tuple[int, ...], place: Sharding
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Patches, positions, mask."""
    vision = session.arch.vision
    patches = shapes.windows * vision.window_patches
    return (
        _array((*lead, patches, vision.patch_dim), jnp.float32, place),
        _array((*lead, patches, 2), jnp.int32, place),
        _array((*lead, patches), jnp.bool_, place),
    )


def _table_rows(session: AbstractSession, shapes: StepShapes) -> int:
    """Merged tokens of one image, padded."""
    return shapes.windows * session.arch.vision.window_patches // session.arch.vision.merge_unit


def image_table(session: AbstractSession, shapes: StepShapes) -> jax.ShapeDtypeStruct:
    """Embeddings of one process's images, [I*M, D]."""
    rows = shapes.host_prompts * _table_rows(session, shapes)
    shape = (rows, session.arch.text.hidden_size)
    place = image_sharding(session.local, shapes.host_prompts)
    return _array(shape, session.config.model.compute_dtype, place)


def _host_array(session: AbstractSession) -> Callable[..., jax.ShapeDtypeStruct]:
    """Arrays that the host hands to a sampling program."""
    return functools.partial(_array, place=replicated(session.local))


def prefill_program(session: AbstractSession, shapes: StepShapes) -> Program:
    """One wave of prompts, read once."""
    prompts, tokens = shapes.wave_prompts, shapes.prompt_tokens
    host = _host_array(session)
    arrays = (
        host((prompts, tokens), jnp.int32),
        host((prompts, 3, tokens), jnp.int32),
        host((prompts,), jnp.int32),
        host((prompts,), jnp.int32),
        host((prompts, tokens), jnp.int32),
        image_table(session, shapes),
    )
    args = (session.parts.graphdef, session.states, *arrays)
    is_int8 = session.config.rollout.kv_cache_dtype == "int8"
    kwargs = {"is_int8": is_int8, "placement": _placement(session)}
    return Program("prefill", decode.prefill, args, kwargs, others=(session.optim,))


def _prompt_cache(
    session: AbstractSession, shapes: StepShapes
) -> PromptCache[jax.ShapeDtypeStruct]:
    program = prefill_program(session, shapes)
    cache: PromptCache[jax.ShapeDtypeStruct] = jax.eval_shape(
        functools.partial(decode.prefill, *program.args[:1], **program.kwargs), *program.args[1:]
    )
    place = prompt_sharding(session.local)
    rest = jax.tree.map(lambda x: x.update(sharding=place), cache)
    return dataclasses.replace(rest, kv=_on_heads(session, cache.kv))


def _placement(session: AbstractSession) -> Placement:
    is_tpu = session.local.devices.flat[0].platform == "tpu"
    return Placement(session.local, session.config.rollout.early_exit, orders_caches=is_tpu)


def _on_heads(session: AbstractSession, tree: Abstract) -> Abstract:
    place = cache_sharding(session.local, is_stacked=not isinstance(tree, tuple))
    return jax.tree.map(lambda x: x.update(sharding=place), tree)


def decode_programs(session: AbstractSession, shapes: StepShapes) -> list[Program]:
    """The decode loop at its largest caches, and the move to fewer rows from there."""
    placement, (per_shard, columns) = _placement(session), largest_size(session, shapes)
    decode_loop = decode_program(session, shapes, per_shard, columns)
    found, full = [decode_loop], shapes.wave_shard_prompts * shapes.group_size
    smaller = layout.next_rows(per_shard, full, placement.has_few_sizes)
    if session.config.rollout.compact and smaller:
        keep = _host_array(session)((smaller * placement.num_shards,), jnp.int32)
        _, states, prompts, _, state, *_ = decode_loop.args
        alive = (states, *decode_loop.others, prompts)
        found.append(Program("shrink", decode.shrink, (state, keep, placement), others=alive))
    return found


def largest_size(session: AbstractSession, shapes: StepShapes) -> tuple[int, int]:
    """(rows of a shard, columns) at which a rollout needs most memory, as `rollout.memory` counts.

    More rows, or more columns, than that wait on the host.
    """
    shape = rollout_shape(session.config, shapes, session.mesh.shape["tensor"])
    arch, columns = session.arch.text, [c for c in shape.columns if c <= shapes.completion_tokens]
    sizes = [(memory.rows_that_fit(arch, shape, one), one) for one in columns]
    return max(sizes, key=lambda size: memory.rollout_bytes(arch, shape, *size).peak)


def decode_program(
    session: AbstractSession, shapes: StepShapes, per_shard: int = 0, columns: int = 0
) -> Program:
    """The decode loop at `per_shard` rows (0: all) and columns (0: the limit)."""
    placement, host = _placement(session), _host_array(session)
    rows = (per_shard or shapes.wave_shard_prompts * shapes.group_size) * placement.num_shards
    prompts = _prompt_cache(session, shapes)
    row_map = RowMap[jax.ShapeDtypeStruct](
        host((rows,), jnp.int32),
        host((rows,), jnp.int32),
        host((shapes.wave_prompts, shapes.group_size), jnp.int32),
    )
    keys, is_done = host((rows, 2), jnp.uint32), host((rows,), jnp.bool_)
    columns = columns or shapes.completion_tokens
    state = _decode_state(session, columns, (prompts, row_map, keys, is_done))
    vocabulary = host((session.arch.text.vocab_size,), jnp.bool_)
    stop_ids = host((2,), jnp.int32)
    scalar = host((), jnp.int32)
    args = (
        *(session.parts.graphdef, session.states, prompts, row_map, state, is_done),
        *(stop_ids, vocabulary, scalar, scalar, training_sampling(session.config), placement),
    )
    alive = (session.optim, image_table(session, shapes))
    return _in_order(Program("decode", decode.decode_chunk, args, others=alive), placement)


def _in_order(loop: Program, placement: Placement) -> Program:
    """The decode loop with its caches as the run hands them over, see `rollout.order`."""
    if not placement.orders_caches:
        return loop
    graphdef, *arrays, sampling, _ = cast(tuple[Any, ...], loop.args)
    orders = order.wanted(order.Loop(graphdef, sampling, placement), *arrays)
    state: DecodeState[jax.ShapeDtypeStruct] = arrays[3]
    own, tree = jax.tree.flatten(state.own)
    ordered = [
        x.update(sharding=Format(Layout(axes), x.sharding))
        for x, axes in zip(own, orders, strict=True)
    ]
    arrays[3] = dataclasses.replace(state, own=jax.tree.unflatten(tree, ordered))
    function = order.program(orders, tuple(x.sharding for x in own), tree)
    args = (graphdef, *arrays, sampling, placement)
    return dataclasses.replace(loop, function=function, args=args)


def _decode_state(
    session: AbstractSession, columns: int, arrays: tuple[Abstract, ...]
) -> DecodeState[jax.ShapeDtypeStruct]:
    start = functools.partial(decode.start, num_columns=columns, placement=_placement(session))
    state: DecodeState[jax.ShapeDtypeStruct] = jax.eval_shape(start, *arrays)
    place = prompt_sharding(session.local)
    rest = map_rows(lambda x: x.update(sharding=place), state)
    step = _host_array(session)((), jnp.int32)
    return dataclasses.replace(rest, own=_on_heads(session, state.own), step=step)


def learning_programs(session: AbstractSession, shapes: StepShapes) -> list[Program]:
    """Old and reference log-probs, where the recipe needs them, and the update."""
    algo, parts, mesh = session.config.algo, session.parts, session.mesh
    settings = LossConfig.of(session.config, session.mesh)
    vocabulary = _array((session.arch.text.vocab_size,), jnp.bool_, replicated(mesh))
    found = []
    # Log-probs of all mini-batches are one program, unless groups are packed.
    at_once = 1 if session.config.train.micro_batch_tokens else shapes.num_updates
    plain = tree_batch(session, dataclasses.replace(shapes, num_micro=shapes.num_micro * at_once))
    if session.config.needs_old_logprobs:
        states = (parts.trainable, parts.frozen)
        old = (parts.graphdef, states, plain, vocabulary, settings)
        found.append(Program("old log-probs", batch_logprobs, old, others=(session.optim,)))
    if algo.kl_coef:
        ref = (parts.reference_graphdef, (parts.frozen,), plain, vocabulary, settings)
        alive = (session.optim, parts.trainable)
        found.append(Program("reference log-probs", batch_logprobs, ref, others=alive))
    args = (
        *(parts.graphdef, parts.trainable, parts.frozen, session.optim),
        *(train_batch(session, shapes), vocabulary, session.optimizer, settings),
    )
    return [*found, Program("update", update_step, args)]


def tree_batch(session: AbstractSession, shapes: StepShapes) -> TreeBatch[jax.ShapeDtypeStruct]:
    """Groups as [U, P, ...] leaves spread over the replicas."""
    make, tokens = _group_array(session, shapes), shapes.prompt_tokens
    width, dtype = session.arch.text.hidden_size, session.config.model.compute_dtype
    table = make(_table_rows(session, shapes), width, dtype=dtype)
    lead = (shapes.num_micro, shapes.micro_prompts)
    patches = _images(session, shapes, lead, prompt_sharding(session.mesh, axis=1))
    return TreeBatch[jax.ShapeDtypeStruct](
        prompt_tokens=make(tokens),
        prompt_lengths=make(),
        positions=make(3, tokens),
        next_position=make(),
        image_rows=make(tokens),
        images=patches if session.config.model.train_vision else table,
        completion_tokens=make(shapes.group_size, shapes.completion_tokens),
    )


def train_batch(session: AbstractSession, shapes: StepShapes) -> TrainBatch[jax.ShapeDtypeStruct]:
    """`tree_batch` with what the recipe's loss needs."""
    make, algo = _group_array(session, shapes), session.config.algo
    has_old = session.config.needs_old_logprobs or algo.old_logprobs == "rollout"
    group = (shapes.group_size, shapes.completion_tokens)

    def make_if(is_there: bool) -> jax.ShapeDtypeStruct | None:
        return make(*group, dtype=np.float32) if is_there else None

    return TrainBatch[jax.ShapeDtypeStruct](
        tree=tree_batch(session, shapes),
        weights=make(*group, dtype=np.float32),
        advantages=make(shapes.group_size, dtype=np.float32),
        old_logprobs=make_if(has_old),
        ref_logprobs=make_if(bool(algo.kl_coef)),
        importance=make_if(algo.importance_cap > 0),
    )


def _group_array(
    session: AbstractSession, shapes: StepShapes
) -> Callable[..., jax.ShapeDtypeStruct]:
    place = prompt_sharding(session.mesh, axis=1)
    lead = (shapes.num_micro, shapes.micro_prompts)

    def make(*tail: int, dtype: DTypeLike = np.int32) -> jax.ShapeDtypeStruct:
        return _array((*lead, *tail), dtype, place)

    return make
