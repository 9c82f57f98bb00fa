"""The device mesh, and where every array lives on it.

    data     replicas: prompts are spread over them, weights are not
    fsdp     prompts are spread over it too, and weights are cut along the dimension that `tensor`
             leaves whole
    tensor   attention heads, MLP columns and the vocabulary are spread over it

A replica is the fsdp x tensor devices that hold one copy of the language model; it lies within one
process, so that a process samples its own prompts without waiting for another. The vision tower
(1.3 GB in bfloat16) is cut over fsdp only; its images are spread over every device. Rollout and
update use the same layout, so nothing moves between them.

Programs are plain jitted functions: XLA derives the communication from the layout of their
arguments (GSPMD), which is why no module of the policy names a mesh.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from speciarl_jax.arch import Arch
from speciarl_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
PROMPT_AXES = ("data", "fsdp")  # what the prompts of a batch are spread over
_COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # out over tensor
_ROW = ("o_proj", "down_proj")  # in over tensor
_WEIGHT_SHARE = 0.45  # of a device's memory that the base may take before `auto` cuts it further


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        config: axis sizes; -1 takes what the others leave.
        devices: all devices of the job, those of a planned topology included; None for jax's own.

    Returns:
        A mesh with axes data, fsdp, tensor, all of type Auto; each replica within one process. In
        a job of one process, sizes that are all given may leave devices idle.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or a replica would span
            processes.
    Source: own.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (config.data, config.fsdp, config.tensor)
    if min(sizes) > 0 and jax.process_count() == 1:
        devices = devices[: math.prod(sizes)]
    _, fsdp, tensor = mesh_shape(config, len(devices))
    by_process: dict[int, list[Any]] = collections.defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device)
    replica, hosts = fsdp * tensor, [by_process[index] for index in sorted(by_process)]
    uneven = [len(host) for host in hosts if len(host) % replica]
    if uneven:
        raise ValueError(
            f"mesh.fsdp={fsdp} x mesh.tensor={tensor}: a replica of {replica} devices would span "
            f"processes, which hold {uneven[0]} each; lower mesh.fsdp or mesh.tensor"
        )
    blocks = [_host_block(host, fsdp, tensor) for host in hosts]
    return Mesh(np.concatenate(blocks), AXES, axis_types=(AxisType.Auto,) * 3)


def _host_block(devices: list[Any], fsdp: int, tensor: int) -> np.ndarray:
    """A host's replicas, its chips in jax's order.

    On v5e, where chips route in straight lines only, XLA refuses collectives over hosts that order
    their chips differently.
    """
    return np.asarray(devices, dtype=object).reshape(-1, fsdp, tensor)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Axis sizes for a number of devices.

    Raises:
        ValueError: they do not multiply to it.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices or min(sizes) < 1:
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}: does not make "
            f"{num_devices} devices; set one axis to -1 or make the product {num_devices}"
        )
    return sizes[0], sizes[1], sizes[2]


def choose_mesh(
    arch: Arch, param_bytes: int, num_devices: int, local_devices: int, memory_bytes: int | None
) -> tuple[MeshConfig, str]:
    """A sound mesh for a model, and why: the smallest replica whose base fits.

    Args:
        arch: heads limit the tensor axis.
        param_bytes: of the language model as stored.
        num_devices: of the job.
        local_devices: of one process; a replica stays within it.
        memory_bytes: of one device; None where the host's memory is shared (CPU): one device per
            replica.

    Raises:
        ValueError: no replica within a process can hold the model.
    """
    if memory_bytes is None:
        return MeshConfig(), "data only: these devices share the host's memory"
    budget = _WEIGHT_SHARE * memory_bytes
    heads = math.gcd(arch.text.num_kv_heads, local_devices)
    tensors = [size for size in range(1, heads + 1) if heads % size == 0]
    pairs = [(1, tensor) for tensor in tensors]
    pairs += [(fsdp, heads) for fsdp in range(2, local_devices // heads + 1)]
    for fsdp, tensor in pairs:
        replica = fsdp * tensor
        if local_devices % replica == 0 and param_bytes / replica <= budget:
            share = param_bytes / replica / 1e9
            reason = (
                f"fsdp={fsdp} tensor={tensor}: {share:.1f} GB of weights a device, at most "
                f"{budget / 1e9:.1f} GB ({_WEIGHT_SHARE:.0%} of its memory) is wanted; "
                f"{num_devices // replica} replicas"
            )
            return MeshConfig(data=-1, fsdp=fsdp, tensor=tensor), reason
    raise ValueError(
        f"mesh.auto: {param_bytes / 1e9:.1f} GB of weights do not fit {local_devices} devices of "
        f"{memory_bytes / 1e9:.0f} GB that one process holds; use larger devices or hosts"
    )


def check_mesh(mesh: Mesh, arch: Arch) -> None:
    """Refuses a tensor axis that would cut a head.

    Raises:
        ValueError: it does not divide the key-value heads.
    """
    tensor, heads = mesh.shape["tensor"], arch.text.num_kv_heads
    if heads % tensor:
        raise ValueError(
            f"mesh.tensor={tensor} does not divide the model's {heads} key-value heads; "
            f"set it to a divisor of {heads}"
        )


def num_replicas(mesh: Mesh) -> int:
    """Over how many places the prompts of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How one parameter is cut; a dimension that its axis does not divide stays whole.

    Args:
        path: of the parameter in the policy, e.g. ("text", "blocks", "q_proj", "kernel").
        shape: leading layer axis included, if the layers are stacked.
        mesh: axis sizes.
    """
    names = [str(part) for part in path]
    kind, layer = names[-1], next((n for n in names[:-1] if n in (*_COLUMN, *_ROW)), "")
    axes: tuple[str | None, ...] = ()
    if names[0] == "visual":
        axes = ("fsdp", None) if kind == "kernel" else ()
    elif kind == "embedding":
        axes = ("tensor", "fsdp")
    elif layer in _COLUMN:
        axes = {
            "kernel": ("fsdp", "tensor"),
            "bias": ("tensor",),
            "lora_a": ("fsdp", None),
            "lora_b": (None, "tensor"),
        }[kind]
    elif layer in _ROW:
        axes = {
            "kernel": ("tensor", "fsdp"),
            "bias": (None,),
            "lora_a": ("tensor", None),
            "lora_b": (None, "fsdp"),
        }[kind]
    full = (None,) * (len(shape) - len(axes)) + axes
    fitted = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(full, shape, strict=True)]
    return PartitionSpec(*fitted)


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
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
    """Keys and values [X, K, ...]: prompts or rows over the replicas, heads over `tensor`.

    Args:
        mesh: of this process.
        is_stacked: layers come first, whole.
    """
    return NamedSharding(mesh, PartitionSpec(*(None,) * is_stacked, PROMPT_AXES, "tensor"))


def image_sharding(mesh: Mesh, num_images: int) -> NamedSharding:
    """Images on the leading axis: over every device if they divide, else over the replicas."""
    axes = AXES if num_images % mesh.size == 0 else PROMPT_AXES
    return NamedSharding(mesh, PartitionSpec(axes))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, state: Any, shardings: nnx.State, mesh: Mesh
) -> Any:
    """Moments lie where their parameters do; counters everywhere.

    Args:
        optimizer: the one whose state it is.
        state: its state, arrays or ShapeDtypeStructs.
        shardings: of the parameters, from `param_shardings`.
        mesh: the mesh.
    """
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def local_mesh(mesh: Mesh) -> Mesh:
    """The replicas of this process."""
    index = jax.process_index()
    rows = [row for row in mesh.devices if row.flat[0].process_index == index]
    if len(rows) == len(mesh.devices):
        return mesh
    return Mesh(np.stack(rows), AXES, axis_types=(AxisType.Auto,) * 3)


def local_view(tree: Any, local: Mesh) -> Any:
    """The same parameters as arrays of this process's replicas only; nothing is copied.

    Args:
        tree: arrays over the whole mesh, none of them cut along ``data``.
        local: from `local_mesh`.
    """

    def view(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(local, x.sharding.spec)
        shards = {shard.device: shard.data for shard in x.addressable_shards}
        arrays = [shards[device] for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, arrays)

    return tree if jax.process_count() == 1 else jax.tree.map(view, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Moves arrays to their places on the mesh.

    Args:
        tree: arrays that lie there already, or that every process holds whole and equal.
        shardings: one for each.
    """

    def move(x: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(move, tree, shardings)


def own_prompts(x: jax.Array, axis: int = 0) -> Any:
    """This process's prompts of a global array; the array itself in a job of one process.

    Args:
        x: as a program returned it, spread over the replicas on axis `axis` and on no other.
        axis: of the prompts.
    """
    if jax.process_count() == 1:
        return x
    parts = {shard.index[axis].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=axis)


def place_prompts(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays of this process's prompts as one global array each, spread over the replicas.

    Args:
        tree: leaves with this process's prompts on axis `axis`, as many in every process.
        mesh: of the job.
        axis: of the prompts; everything else stays whole.
    """
    sharding = prompt_sharding(mesh, axis)

    def place(x: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(jax.device_get(x)))

    return jax.tree.map(place, tree)
