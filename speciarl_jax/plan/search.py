"""The largest micro-batch, mesh and rematerialisation policy that fit a topology.

For each mesh whose weights fit: the policy that recomputes least and still fits one prompt, then
the largest micro-batch under it. Of those, the one with the shortest estimated step. What is left
of the memory bounds the caches of a rollout.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import math

from speciarl_jax.config.schema import Config, MeshConfig
from speciarl_jax.plan.chips import GIB, Topology
from speciarl_jax.plan.make import Planned, log, open_plan
from speciarl_jax.plan.measure import measure
from speciarl_jax.plan.models import planned_arch
from speciarl_jax.plan.programs import device_bytes, image_table, learning_programs

_POLICIES = ("none", "dots", "full")  # from least to most recomputation
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Found:
    """A recipe that fits.

    Attributes:
        config: with mesh, remat, micro-batch and cache limit set.
        flags: the same as overrides for the command line.
        step_s: estimated seconds of a step.
    """

    config: Config
    flags: str
    step_s: float


def search(config: Config, topology: Topology) -> Found:
    """Tries meshes, policies and micro-batches by compiling the update.

    The recipe's own mesh, remat and micro-batch are not looked at.

    Raises:
        ValueError: nothing fits, or groups are packed by tokens.
    """
    if config.train.micro_batch_tokens:
        raise ValueError(
            f"--search with train.micro_batch_tokens={config.train.micro_batch_tokens}: it looks "
            "for prompts_per_micro_batch; set train.micro_batch_tokens=0"
        )
    candidates = [_best_of_mesh(config, mesh, topology) for mesh in _meshes(config, topology)]
    found = [candidate for candidate in candidates if candidate is not None]
    if not found:
        raise ValueError(
            f"--search: {config.model.path} does not fit {topology.name} with one prompt per "
            "micro-batch and full rematerialisation; use larger chips, or lower "
            "rollout.max_completion_tokens, data.max_prompt_tokens or rollout.group_size"
        )
    return min(found, key=lambda one: one.step_s)


def _meshes(config: Config, topology: Topology) -> list[MeshConfig]:
    """Replicas within a host; heads are cut before weights are."""
    local = len(topology.local_devices)
    heads = math.gcd(planned_arch(config.model.path).text.num_kv_heads, local)
    return [
        MeshConfig(-1, fsdp, tensor)
        for tensor in _divisors(heads)
        for fsdp in _divisors(local // tensor)
        if config.train.prompts_per_update % (len(topology.devices) // tensor) == 0
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _best_of_mesh(config: Config, mesh: MeshConfig, topology: Topology) -> Found | None:
    for remat in _POLICIES:
        planned = _with_settings(config, topology, mesh, remat, 1)
        if _resident_bytes(planned) > topology.chip.usable_bytes or not _leaves_cache(planned):
            return None  # whatever the policy
        if _fits(planned):
            micro = _largest_micro_batch(planned)
            return _found(_with_settings(config, topology, mesh, remat, micro))
    return None


def _with_settings(
    config: Config, topology: Topology, mesh: MeshConfig, remat: str, micro: int
) -> Planned:
    config = copy.deepcopy(config)
    config.mesh, config.model.remat = dataclasses.replace(mesh), remat
    config.train.prompts_per_micro_batch = micro
    config.rollout.max_cache_mb = 0
    return open_plan(config, topology)


def _resident_bytes(planned: Planned) -> int:
    """What is on a device in every program of the rollout."""
    session = planned.session
    table = image_table(session, planned.shapes)
    return device_bytes((session.states, session.optim, table))


def _cache_mb(planned: Planned) -> int:
    """Memory that the resident arrays leave to a rollout, MiB."""
    return (planned.topology.chip.usable_bytes - _resident_bytes(planned)) // _MIB


def _leaves_cache(planned: Planned) -> bool:
    """Whether one prompt a shard can be sampled in what is left."""
    config = copy.deepcopy(planned.config)
    config.rollout.max_cache_mb = _cache_mb(planned)
    try:
        open_plan(config, planned.topology)
    except ValueError as error:
        log(f"mesh {_mesh_name(planned)}: {error}")
        return False
    return True


def _fits(planned: Planned) -> bool:
    *_, update = learning_programs(planned.session, planned.shapes)
    measured = measure(update)
    is_fit = measured.fits(planned.topology.chip.usable_bytes)
    log(
        f"mesh {_mesh_name(planned)}, remat {planned.config.model.remat}, "
        f"{planned.config.train.prompts_per_micro_batch} prompts: {measured.peak / GIB:.2f} GiB"
        f"{'' if is_fit else ' does not fit'} ({measured.compile_s:.0f} s)"
    )
    return is_fit


def _mesh_name(planned: Planned) -> str:
    return " x ".join(f"{k} {v}" for k, v in planned.session.mesh.shape.items())


def _largest_micro_batch(planned: Planned) -> int:
    """Bisection over the divisors of a replica's share of an update; 1 is known to fit."""
    config, topology = planned.config, planned.topology
    sizes = _divisors(config.train.prompts_per_update // planned.layout.num_replicas)

    def is_too_large(size: int) -> bool:
        mesh, remat = config.mesh, config.model.remat
        return not _fits(_with_settings(config, topology, mesh, remat, size))

    return sizes[bisect.bisect_left(sizes, True, lo=1, key=is_too_large) - 1]


def _found(planned: Planned) -> Found:
    config = copy.deepcopy(planned.config)
    config.rollout.max_cache_mb = _cache_mb(planned)
    planned = open_plan(config, planned.topology)
    flags = (
        f"--config.mesh.fsdp={config.mesh.fsdp} --config.mesh.tensor={config.mesh.tensor} "
        f"--config.model.remat={config.model.remat} "
        f"--config.train.prompts_per_micro_batch={config.train.prompts_per_micro_batch} "
        f"--config.rollout.max_cache_mb={config.rollout.max_cache_mb}"
    )
    return Found(config, flags, sum(one.seconds for one in planned.work().values()))
