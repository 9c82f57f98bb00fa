"""NVIDIA GPUs that are not there, as devices that XLA compiles for.

jax's CUDA plugin compiles without a driver if it is told what the card is. Passes that time
kernels are left out then, so tile sizes are XLA's own guesses, and whether cuDNN accepts a graph is
found out at run time only; memory, fusions, copies and the number of kernels are those of the card.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
from jax.experimental import topologies

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
NO_TUNING = (
    "compiled by XLA for GPU without the card: nothing is tuned and no kernel is tried, so tiles "
    "may be others there"
)
NO_PLUGIN = (
    "GPU planned from XLA for CPU: temporaries are an upper bound (no fused attention, bfloat16 "
    "products computed in float32), kernels and collectives are not those of the GPU; "
    "pip install 'speciarl-jax[plan-gpu]' compiles for the GPU itself"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What XLA asks about a card to compile for it.

    Attributes:
        capability: CUDA compute capability.
        cores: streaming multiprocessors.
        fpus, threads: per core.
        shared_kib: shared memory per core; one block may have 1 KiB less.
        l2_mib: second-level cache.
        clock_ghz: highest clock.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_kib: int
    l2_mib: float
    clock_ghz: float


# A100, H100, H200, B200: openxla/xla, xla/backends/gpu/target_config/specs. L40S, L4, A10G, RTX
# 4090: data sheets and the tables of compute capabilities in NVIDIA's CUDA C++ Programming Guide.
TARGETS = {
    "b200": Target((10, 0), 148, 128, 2048, 228, 126.5, 1.965),
    "h200": Target((9, 0), 132, 128, 2048, 228, 50, 1.98),
    "h100": Target((9, 0), 132, 128, 2048, 228, 50, 1.98),
    "a100": Target((8, 0), 108, 64, 2048, 164, 40, 1.41),
    "l40s": Target((8, 9), 142, 128, 1536, 100, 96, 2.52),
    "l4": Target((8, 9), 58, 128, 1536, 100, 48, 2.04),
    "a10g": Target((8, 6), 80, 128, 1536, 100, 6, 1.71),
    "rtx4090": Target((8, 9), 128, 128, 1536, 100, 72, 2.52),
}

_TEXT = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {cores} fpus_per_core: {fpus}
  threads_per_core_limit: {threads} threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_core: {shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin} l2_cache_size: {l2}
  clock_rate_ghz: {clock} memory_bandwidth: {bandwidth} device_memory_size: {memory}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368
  name: "{kind}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


def has_compiler() -> bool:
    """Whether jax's CUDA plugin is installed; neither a card nor a driver is needed."""
    return any(importlib.util.find_spec(plugin) is not None for plugin in PLUGINS)


def target_text(name: str, kind: str, memory_bytes: int, bandwidth: float) -> str:
    """A card as XLA's GpuTargetConfigProto in text form.

    Args:
        name: of `TARGETS`.
        kind: `jax.Device.device_kind`.
        memory_bytes: of the card.
        bandwidth: bytes a second.
    """
    target = TARGETS[name]
    major, minor = target.capability
    return _TEXT.format(
        major=major,
        minor=minor,
        extension="ACCELERATED_FEATURES" if major >= 9 else "NONE",  # Hopper on: sm_90a, sm_100a
        cores=target.cores,
        fpus=target.fpus,
        threads=target.threads,
        shared=target.shared_kib * 1024,
        optin=(target.shared_kib - 1) * 1024,
        l2=int(target.l2_mib * 2**20),
        clock=target.clock_ghz,
        bandwidth=int(bandwidth),
        memory=memory_bytes,
        kind=kind,
    )


def open_gpus(topology: str, target: str, count: int) -> tuple[jax.Device, ...]:
    """`count` GPUs of one host, to compile for.

    Args:
        topology: as given on the command line, for the error.
        target: from `target_text`.
        count: of devices.

    Raises:
        ValueError: the plugin does not fit this jax.
    """
    try:
        found = topologies.get_topology_desc(
            topology_name="", platform="cuda", target_config=target, topology=f"1x1x{count}"
        )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology={topology}: jax's CUDA plugin does not compile for it ({reason}); "
            f"pip install 'jax[cuda13]=={jax.__version__}'"
        ) from error
    return tuple(found.devices)
