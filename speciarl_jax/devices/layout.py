"""The device mesh, and where every array lives on it.

    data     replicas: prompts are spread over them, weights are not
    fsdp     prompts are spread over it too, and weights are cut along the dimension that `tensor`
             leaves whole
    tensor   attention heads, MLP columns and the vocabulary are spread over it

A replica is the fsdp x tensor devices that hold one copy of the language model. Where it lies
within one process, that process can sample its own prompts without waiting for another; processes
that have one place of data x fsdp together hold the same prompts. The vision tower
(1.3 GB in bfloat16) is cut over fsdp only; its images are spread over every device. Rollout and
update use the same layout, so nothing moves between them.

Programs are plain jitted functions: XLA derives the communication from the layout of their
arguments (GSPMD), which is why no module of the policy names a mesh.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeAlias

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from typing_extensions import TypeVar

from speciarl_jax.devices import processes
from speciarl_jax.devices.mesh import AXES

# Parameters by name: variables, or further states of that kind.
Params: TypeAlias = nnx.State[str, object]
# On a device, or still with the host.
AnyArray: TypeAlias = Array | np.ndarray
# What a registered dataclass holds for each array: the array itself, where it lies, or only its
# shape and dtype. Not named, it is `Array`.
Leaf = TypeVar("Leaf", default=Array)
Tree = TypeVar("Tree")

PROMPT_AXES = ("data", "fsdp")  # what the prompts of a batch are spread over
_COLUMN = {  # heads, MLP columns, vocabulary: the output lies over `tensor`
    "kernel": ("fsdp", "tensor"),
    "bias": ("tensor",),
    "lora_a": ("fsdp", None),
    "lora_b": (None, "tensor"),
}
_ROW = {  # back to the width: the input does
    "kernel": ("tensor", "fsdp"),
    "bias": (None,),
    "lora_a": ("tensor", None),
    "lora_b": (None, "fsdp"),
}
_LAYERS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), _COLUMN)
_LAYERS |= dict.fromkeys(("o_proj", "down_proj"), _ROW)


def param_spec(path: tuple[Hashable, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is cut; a dimension that its axis does not divide stays whole.

    Args:
        path: of the parameter in the policy, e.g. ("text", "blocks", "q_proj", "kernel").
        shape: leading layer axis included, if the layers are stacked.
        mesh: axis sizes.
    """
    names = [str(part) for part in path]
    kind, layer = names[-1], next((n for n in names[:-1] if n in _LAYERS), "")
    axes: tuple[str | None, ...] = ()
    if names[0] == "visual":
        axes = ("fsdp", None) if kind == "kernel" else ()
    elif kind == "embedding":
        axes = ("tensor", "fsdp")
    elif layer:
        axes = _LAYERS[layer][kind]
    full = (None,) * (len(shape) - len(axes)) + axes
    fitted = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(full, shape, strict=True)]
    return PartitionSpec(*fitted)


def param_shardings(state: Params, mesh: Mesh) -> Params:
    """A sharding for each parameter of a state (arrays or ShapeDtypeStructs), same structure."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        spec = param_spec(path, variable.get_value().shape, mesh)
        flat.append((path, variable.replace(NamedSharding(mesh, spec))))
    return nnx.from_flat_state(flat)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def prompt_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Prompts, on axis `axis` of an array, spread over the replicas."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, PROMPT_AXES))


def cache_sharding(mesh: Mesh, *, is_stacked: bool) -> NamedSharding:
    """Keys and values [X, K, ...], or [L, X, K, ...] stacked: heads lie over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * is_stacked, PROMPT_AXES, "tensor"))


def image_sharding(mesh: Mesh, num_images: int) -> NamedSharding:
    """Images on the leading axis: over every device if they divide, else over the replicas."""
    axes = AXES if num_images % mesh.size == 0 else PROMPT_AXES
    return NamedSharding(mesh, PartitionSpec(axes))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, state: PyTree, shardings: Params, mesh: Mesh
) -> PyTree[NamedSharding]:
    """Moments of an optimiser's `state` lie where their parameters do; counters everywhere."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def local_view(tree: Tree, local: Mesh) -> Tree:
    """Arrays, none cut along ``data``, as those of this process's replicas only; nothing copied."""

    def view(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding), x.sharding
        sharding = NamedSharding(local, x.sharding.spec)
        shards = {shard.device: shard.data for shard in x.addressable_shards}
        arrays = [shards[device] for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, arrays)

    if jax.process_count() == 1:
        return tree
    seen: Tree = jax.tree.map(view, tree)
    return seen


def place(tree: Tree, shardings: PyTree[NamedSharding]) -> Tree:
    """Moves arrays, there already or held whole and equal by all processes, to their places."""

    def move(x: AnyArray, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            on_mesh: Array = jax.device_put(x, sharding)
            return on_mesh
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    moved: Tree = jax.tree.map(move, tree, shardings)
    return moved


def own_prompts(x: jax.Array, axis: int = 0) -> AnyArray:
    """This process's prompts of a global array, which is spread over the replicas on `axis` only.

    An array that lies on devices of this process only is returned as it is.
    """
    if x.is_fully_addressable:
        return x
    parts = {shard.index[axis].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=axis)


def place_prompts(tree: Tree, mesh: Mesh, axis: int = 0) -> Tree:
    """Arrays of this process's prompts as one global array each, spread over the replicas.

    `axis` is that of the prompts, as many in every process; everything else stays whole.
    """
    return place_own(tree, prompt_sharding(mesh, axis), axis)


def place_own(tree: Tree, sharding: NamedSharding, axis: int = 0) -> Tree:
    """Arrays of this process's prompts as one global array each, placed as `sharding` says.

    Prompts or their images lie on `axis`, as many in every process; those that share prompts all
    hold them, and each of their devices takes its part.
    """

    def move(x: AnyArray) -> jax.Array:
        if not sharding.mesh.is_multi_process:
            on_mesh: Array = jax.device_put(x, sharding)
            return on_mesh
        own = np.asarray(jax.device_get(x))
        count = own.shape[axis]
        total, first = count * processes.num_shares(), count * processes.share_index()

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "an array of rank 0 has no prompts"
            start, stop, _ = index[axis].indices(total)
            rows = slice(start - first, stop - first)
            piece: np.ndarray = own[(*index[:axis], rows, *index[axis + 1 :])]
            return piece

        shape = (*own.shape[:axis], total, *own.shape[axis + 1 :])
        whole: Array = jax.make_array_from_callback(shape, sharding, part)
        return whole

    placed: Tree = jax.tree.map(move, tree)
    return placed
