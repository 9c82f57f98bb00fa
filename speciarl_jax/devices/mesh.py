"""The device mesh: its axes, its size, the part of one process."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import MeshConfig

AXES = ("data", "fsdp", "tensor")
_WEIGHT_SHARE = 0.45  # of a device's memory that the base may take before `auto` cuts it further


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        config: axis sizes; -1 takes what the others leave.
        devices: all devices of the job, those of a planned topology included; None for jax's own.

    Returns:
        A mesh with axes data, fsdp, tensor, all of type Auto; devices process by process, so that
        a replica lies within one, or consists of whole ones. In a job of one process, sizes that
        are all given may leave devices idle.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or a replica would have
            parts of processes.
    Source: own.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (config.data, config.fsdp, config.tensor)
    if min(sizes) > 0 and jax.process_count() == 1:
        devices = devices[: math.prod(sizes)]
    _, fsdp, tensor = mesh_shape(config, len(devices))
    by_process: dict[int, list[jax.Device]] = collections.defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device)
    replica, hosts = fsdp * tensor, [by_process[index] for index in sorted(by_process)]
    sizes_of_hosts = {len(host) for host in hosts}
    uneven = [size for size in sizes_of_hosts if size % replica and replica % size]
    uneven += [size for size in sizes_of_hosts if size % tensor and tensor % size]
    if uneven or (len(sizes_of_hosts) > 1 and max(sizes_of_hosts) < replica):
        raise ValueError(
            f"mesh.fsdp={fsdp} x mesh.tensor={tensor}: a replica of {replica} devices has parts of "
            f"processes, which hold {min(sizes_of_hosts)} each; both mesh.tensor and the product "
            "must divide that number or be multiples of it"
        )
    # A host's chips stay in jax's order: on v5e, where chips route in straight lines only, XLA
    # refuses collectives over hosts that order theirs differently.
    ordered = np.asarray([device for host in hosts for device in host], dtype=object)
    return Mesh(ordered.reshape(-1, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


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
    # Heads are cut first, as far as they divide; then the other dimension, until the base fits.
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
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def own_replicas(mesh: Mesh) -> int:
    """The places of data x fsdp whose prompts a process has."""
    return num_replicas(mesh) // (
        len({d.process_index for d in mesh.devices.flat}) // sharing(mesh)
    )


def sharing(mesh: Mesh) -> int:
    """Processes that have one place of data x fsdp together, and so the same prompts; mostly 1."""
    return len({device.process_index for device in mesh.devices[0, 0]})


def sampling_mesh(mesh: Mesh, scope: str) -> Mesh:
    """The part of the job's mesh that one rollout runs on.

    Args:
        mesh: of the job.
        scope: ``rollout.scope``: job, host (the replicas of this process), or auto: job where
            replicas span processes and on several TPU hosts, whose library refuses programs over
            some parts of a slice.

    Raises:
        ValueError: host, where replicas span processes.
    """
    spans = any(len({device.process_index for device in row.flat}) > 1 for row in mesh.devices)
    if scope == "auto":
        is_pod = mesh.is_multi_process and mesh.devices.flat[0].platform == "tpu"
        scope = "job" if is_pod or spans else "host"
    if scope == "job":
        return mesh
    if spans:
        raise ValueError(
            f"rollout.scope=host with mesh.fsdp={mesh.shape['fsdp']} x mesh.tensor="
            f"{mesh.shape['tensor']}: a replica spans processes, so none can sample by itself; set "
            "rollout.scope=job, or lower mesh.fsdp or mesh.tensor"
        )
    return local_mesh(mesh)


def local_mesh(mesh: Mesh) -> Mesh:
    """The replicas of this process."""
    index = jax.process_index()
    rows = [row for row in mesh.devices if row.flat[0].process_index == index]
    if len(rows) == len(mesh.devices):
        return mesh
    return Mesh(np.stack(rows), AXES, axis_types=(AxisType.Auto,) * 3)
