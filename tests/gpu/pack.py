"""Wheels for a machine with a GPU and without a network: what the project needs and it lacks.

    make gpu-pack                      (or: python -m tests.gpu.pack [--out=DIR] [--have NAMES])

Resolves the project as pip would install it afresh and keeps what is neither in HAVE nor needed
only by it: jax with its CUDA plugin, flax, optax, orbax, transformers and torch are gigabytes and
are there. The wheels are for the Python that runs it (VENV=.venv312 PYTHON=python3.12).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HAVE = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "peft")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu_wheels"))
    parser.add_argument("--have", nargs="*", default=list(HAVE), help="packages of that machine")
    args = parser.parse_args()
    needed = missing(resolve(), args.have)
    args.out.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={version}" for name, version in sorted(needed.items())]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={args.out}"]
    subprocess.run([*build, *pins], check=True)
    wheels = list(args.out.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, in {args.out}; on the other machine:")
    print(f"  python3 -m pip install --no-index --no-deps {args.out}/*.whl")
    print("  python3 -m pip install --no-index --no-deps --no-build-isolation -e .")
    return 0


def resolve() -> list[dict]:
    """What pip would install of the project in an empty environment: metadata of each package."""
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q"]
    own = importlib.metadata.requires("speciarl-jax") or []
    needed = [one.split(";")[0] for one in own if applies(Requirement(one))]
    report = subprocess.run([*asked, "--report=-", *needed], check=True, stdout=subprocess.PIPE)
    return [one["metadata"] for one in json.loads(report.stdout)["install"]]


def applies(requirement: Requirement) -> bool:
    """Whether a package without extras needs it with this Python."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def missing(packages: Iterable[dict], have: Iterable[str]) -> dict[str, str]:
    """Version by name of what is not there: neither one of `have` nor reached from one of them.

    Args:
        packages: metadata as pip reports it: name, version, requires_dist.
        have: packages that are installed on that machine, with all that they need.
    """
    known = {canonicalize_name(one["name"]): one for one in packages}
    there, left = set(), [canonicalize_name(name) for name in have]
    while left:
        name = left.pop()
        if name in there:
            continue
        there.add(name)
        for text in known.get(name, {}).get("requires_dist", []):
            requirement = Requirement(text)
            if applies(requirement):
                left.append(canonicalize_name(requirement.name))
    return {name: one["version"] for name, one in known.items() if name not in there}


if __name__ == "__main__":
    sys.exit(main())
