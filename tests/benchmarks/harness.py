"""What the peer benchmarks share: one core, interleaved timing, machine floor, provenance.

The two sides of a comparison take turns within one process on one core, so that whatever else the
machine does disturbs both alike; ratios are of the medians. No jax or torch is imported here before
`use_one_core` has run.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

# Benchmarks run as scripts; what they share with tests lies below the repository's root.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # glibc's malloc.h
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft")


def use_one_core(*, is_memory_run: bool = False) -> None:
    """Pins the process to its first core and both frameworks to one thread; call it first.

    Args:
        is_memory_run: for `peak_growth_mb`: freed memory goes back at once. Otherwise glibc keeps
            it, for both sides: in a virtual machine that gives freed pages back to its host,
            faulting a gigabyte in again takes up to five seconds, and it hits the other side.

    Raises:
        OSError: not glibc.
    """
    keep = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    give_back = ((_M_MMAP_THRESHOLD, 2**16), (_M_TRIM_THRESHOLD, 2**16))
    libc = ctypes.CDLL("libc.so.6")
    for option, value in give_back if is_memory_run else keep:
        if libc.mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) was refused; these benchmarks need glibc")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    flag = "--xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)


def peak_growth_mb(run: Callable[[], object]) -> int:
    """MiB by which the resident memory of the process peaks above where it stood before `run`."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kb("VmRSS")
    run()
    return round((_status_kb("VmHWM") - before) / 1024)


def _status_kb(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}; these benchmarks need Linux")


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median, smallest and largest of the repeats, seconds."""
    return {
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "repeats": len(seconds),
    }


def interleaved(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; the sides take turns. The caller has run each once, to compile.

    Args:
        sides: name to a function that returns when its work is done.
        repeats: timed calls of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the extremes of the ratios of neighbouring calls."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "ratio": round(statistics.median(slow) / statistics.median(fast), 2),
        "low": round(min(pairs), 2),
        "high": round(max(pairs), 2),
    }


def gemm_gflops(repeats: int = 7) -> dict[str, float]:
    """float32 rate of a 768^3 product in both frameworks, best of the repeats, GFLOP/s."""
    import jax
    import torch

    size = 768
    data = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    ours, theirs = jax.numpy.asarray(data), torch.from_numpy(data)
    product = jax.jit(lambda a: a @ a)
    product(ours).block_until_ready()
    seconds = interleaved(
        {"jax": lambda: product(ours).block_until_ready(), "torch": lambda: theirs @ theirs},
        repeats,
    )
    return {name: round(2e-9 * size**3 / min(times), 1) for name, times in seconds.items()}


def read_gbytes_per_s(num_bytes: int, repeats: int = 7) -> float:
    """Rate at which an array of this size is read (summed by torch), best of the repeats, GB/s."""
    import torch

    data = torch.ones(max(num_bytes // 4, 1))
    calls = max(1, int(5e7 // num_bytes))

    def run() -> None:
        for _ in range(calls):
            data.sum()

    seconds = interleaved({"read": run}, repeats)["read"]
    return round(1e-9 * num_bytes * calls / min(seconds), 1)


def provenance() -> dict[str, object]:
    """Commit, versions, processor, load and date of a run."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    here = pathlib.Path(__file__).parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True, check=True)
    models = [
        line.split(":", 1)[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": commit.stdout.strip(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "cpu": f"{models[0]}, {len(models)} cores, 1 used",
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
