"""Accelerators: memory, bandwidth, and their devices as jax sees them without having them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

from speciarl_jax.devices import gpu_memory
from speciarl_jax.plan import gpu
from speciarl_jax.policy.flops import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        kind: `jax.Device.device_kind`, which names the peak in `speciarl_jax.policy.flops`.
        memory_gib: of one device.
        usable_frac: share of it that a program may use; the rest is the runtime's.
        hbm_gb_s: memory bandwidth, 1e9 bytes a second.
        link_gb_s: one link to a neighbour in one direction, 1e9 bytes a second.
        hop_us: of a transfer between two neighbours, however small, microseconds.
        config_name: libtpu's name of the core configuration, "" for its default.
    """

    kind: str
    memory_gib: float
    usable_frac: float
    hbm_gb_s: float
    link_gb_s: float
    config_name: str = ""
    hop_us: float = 1.0

    @property
    def usable_bytes(self) -> int:
        """What a program may use, bytes."""
        return int(self.memory_gib * GIB * self.usable_frac)

    @property
    def bytes_per_s(self) -> float:
        """Memory bandwidth."""
        return self.hbm_gb_s * 1e9

    @property
    def wire_bytes_per_s(self) -> float:
        """Of a ring over neighbours, both directions of one axis."""
        return 2 * self.link_gb_s * 1e9

    @property
    def hop_s(self) -> float:
        """`hop_us` in seconds."""
        return self.hop_us * 1e-6

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s.

        Raises:
            ValueError: `speciarl_jax.policy.flops` does not know the kind.
        """
        peak = peak_flops(self.kind)
        if peak is None:
            raise ValueError(
                f"{self.kind}: no peak in speciarl_jax.policy.flops.PEAK_FLOPS; add it"
            )
        return peak


# TPU: memory and bandwidth from the system architecture pages of cloud.google.com/tpu/docs, links
# as one-way bandwidth of one of the 4 (v5e, v6e) or 6 (v4, v5p) inter-chip links. XLA keeps about
# 2 to 4 % of a TPU's memory. GPU: data sheets, memory as nvidia-smi shows it; NVLink is half of the
# one-way total; jax takes `devices.gpu_memory.DEFAULT_FRAC` of it, or what the user says. A hop
# takes about a microsecond on a TPU ("How to Scale Your Model", sharding); 2.5 on a GPU makes the
# 10 that NCCL takes for a small sum over four. Frozen: tables of docs/scale.md are compared over
# months.
_GPU_FRAC = gpu_memory.DEFAULT_FRAC
CHIPS = {
    "v4": Chip("TPU v4", 32, 0.96, 1228, 45, "megacore"),
    "v5e": Chip("TPU v5 lite", 16, 0.98, 819, 45),
    "v5p": Chip("TPU v5", 95, 0.98, 2765, 90),
    "v6e": Chip("TPU v6 lite", 32, 0.97, 1640, 90),
    "b200": Chip("NVIDIA B200", 178, _GPU_FRAC, 7672, 450, hop_us=2.5),
    "h200": Chip("NVIDIA H200", 139, _GPU_FRAC, 4800, 225, hop_us=2.5),
    "h100": Chip("NVIDIA H100", 79, _GPU_FRAC, 3350, 225, hop_us=2.5),
    "a100": Chip("NVIDIA A100", 79, _GPU_FRAC, 2039, 150, hop_us=2.5),
    "l40s": Chip("NVIDIA L40S", 44, _GPU_FRAC, 864, 16, hop_us=2.5),
    "l4": Chip("NVIDIA L4", 22, _GPU_FRAC, 300, 8, hop_us=2.5),
    "a10g": Chip("NVIDIA A10G", 22, _GPU_FRAC, 600, 8, hop_us=2.5),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 23.5, _GPU_FRAC, 1008, 16, hop_us=2.5),
}
_GPUS = tuple(gpu.TARGETS)
_TPUS = tuple(name for name in CHIPS if name not in _GPUS)
_LOOP_MOTION = ("while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion")
_MAX_GPUS = 8  # of one host; a replica lies within one


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for.

    Attributes:
        name, chip: as given, ``v5e:8x8``, and what each device is.
        devices: jax devices that programs can be compiled for, not run on.
        local_devices: those of one process.
        caveat: what the figures do not say; "" for TPU.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    local_devices: tuple[jax.Device, ...]
    caveat: str = ""

    @property
    def num_hosts(self) -> int:
        """Processes of the job."""
        return len({device.process_index for device in self.devices})


def parse_topology(name: str) -> tuple[str, str, int]:
    """``v5e:8x8`` or ``gpu:h200x8`` as (chip, shape, number of devices).

    Raises:
        ValueError: unknown chip, or no sizes.
    """
    tpu = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    card = re.fullmatch(r"gpu:([a-z0-9]+?)x(\d+)", name)
    if card and card[1] in _GPUS and 1 <= int(card[2]) <= _MAX_GPUS:
        return card[1], card[2], int(card[2])
    if tpu and tpu[1] in _TPUS:
        return tpu[1], tpu[2], math.prod(map(int, tpu[2].split("x")))
    raise ValueError(
        f"--topology={name}: expected CHIP:SIZES with CHIP one of {', '.join(_TPUS)} (v5e:8x8, "
        f"v5p:2x2x4), or gpu:CHIPxN with CHIP one of {', '.join(_GPUS)} and N up to {_MAX_GPUS}"
    )


def libtpu_misfit(name: str) -> str:
    """Whether the installed libtpu is another one than jax was made for, and how to mend it.

    A newer libtpu compiles, and XLA in jaxlib then cannot read what it compiled. Returns one line
    with both versions; "" if they fit, none is installed (`open_topology` says so),
    TPU_LIBRARY_PATH names a file whose version nobody knows, or topology `name` is no TPU.
    """
    if name.startswith("gpu:") or "TPU_LIBRARY_PATH" in os.environ:
        return ""
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""
    parsed = map(Requirement, importlib.metadata.requires("jax") or ())
    pins = [one.specifier for one in parsed if one.name == "libtpu"]
    if all(pin.contains(installed, prereleases=True) for pin in pins):
        return ""
    wanted = " or ".join(str(pin) for pin in pins)
    return (
        f"libtpu {installed} is installed, jax {jax.__version__} needs libtpu{wanted}; "
        f"pip install 'jax[tpu]=={jax.__version__}'"
    )


def open_topology(name: str) -> Topology:
    """The devices of a topology; needs the environment of `worker_environment`.

    Raises:
        ValueError: unknown topology, libtpu is not installed or refuses the shape, or too few fake
            devices.
    """
    chip_name, shape, count = parse_topology(name)
    chip = CHIPS[chip_name]
    if chip_name in _GPUS:
        chip = dataclasses.replace(chip, usable_frac=gpu_memory.usable_frac(os.environ))
        if gpu.has_compiler():
            memory = int(chip.memory_gib * GIB)
            target = gpu.target_text(chip_name, chip.kind, memory, chip.hbm_gb_s * 1e9)
            cards = gpu.open_gpus(name, target, count)
            return Topology(name, chip, cards, cards, caveat=gpu.NO_TUNING)
        fakes = jax.devices("cpu")
        if len(fakes) < count:
            raise ValueError(f"--topology={name}: {len(fakes)} fake devices, expected {count}")
        chosen = tuple(fakes[:count])
        return Topology(name, chip, chosen, chosen, caveat=gpu.NO_PLUGIN)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            f"--topology={name}: compiling for TPU needs libtpu; pip install 'speciarl-jax[plan]'"
        )
    devices = _tpu_devices(name, f"{chip_name}:{shape}", chip)
    local = tuple(device for device in devices if device.process_index == 0)
    return Topology(name, chip, devices, local)


def _tpu_devices(name: str, shape: str, chip: Chip) -> tuple[jax.Device, ...]:
    options = {"chip_config_name": chip.config_name} if chip.config_name else {}
    try:
        found = topologies.get_topology_desc(shape, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={name}: libtpu refuses it ({reason})") from error
    return tuple(found.devices)


def worker_environment(name: str) -> dict[str, str]:
    """Environment in which `open_topology` works: no TPU is looked for, fake devices for GPU.

    Without the CUDA plugin a GPU is planned from XLA for CPU, which turns bfloat16 weights into
    float32 before a product, and would do so for all layers at once ahead of the loop; a GPU needs
    no copy, so that motion is switched off.
    """
    chip_name, _, count = parse_topology(name)
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    if chip_name in _GPUS and not gpu.has_compiler():
        flags.append(f"--xla_disable_hlo_passes={','.join(_LOOP_MOTION)}")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "XLA_FLAGS": " ".join(flags).strip(),
    }
