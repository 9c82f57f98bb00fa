"""Two trees of this repository for `tests.drills.witness`, and the training of a run in each."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from tests.drills.witness_runs import Evidence, Run

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("speciarl_jax", "configs", "setup.py")  # of a tree, what a run can read
TIMEOUT_S = 1800
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "tokenizers", "transformers")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
# The command of one tree: arguments are tree, module, function, then those of `speciarl`.
LAUNCHER = """
import importlib, pathlib, sys
tree, module, function = sys.argv[1:4]
# The editable install would answer for modules that this tree does not have.
editable = "__editable___speciarl_jax"
finders = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith(editable)]
sys.meta_path[:] = finders
sys.argv = ["speciarl", *sys.argv[4:]]
code = getattr(importlib.import_module(module), function)()
package = pathlib.Path(tree, "speciarl_jax")
for name, found in list(sys.modules.items()):
    if name.split(".")[0] == "speciarl_jax":
        place = getattr(found, "__file__", None) or next(iter(found.__path__))
        if package not in (pathlib.Path(place), *pathlib.Path(place).parents):
            sys.exit(f"witness: {name} was imported from {place}, expected below {package}")
sys.exit(code)
"""


class RunFailedError(Exception):
    """A run ended with an error; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """A copy of a tree and its results.

    Attributes:
        label: in messages.
        home: of the results; the copy is home/tree, prepared data home/data.
        policy: directory of the policy that every run starts from.
        programs: folder of compiled programs; equal programs of both trees are compiled once.
    """

    label: str
    home: pathlib.Path
    policy: pathlib.Path
    programs: pathlib.Path


def git(*words: str) -> bytes:
    """Output of git in the repository.

    Raises:
        ValueError: git refuses; its last line.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode().strip().splitlines()[-1:]
        raise ValueError(f"git {' '.join(words)}: {' '.join(reason)}; give --base a commit")
    return done.stdout


def open_trees(cache: pathlib.Path, base: str) -> tuple[Tree, Tree]:
    """BASE's tree, and the working tree as it is now, untracked files included.

    Raises:
        ValueError: no such commit, or one without the shipped policy.
    """
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}").decode().strip()
    homes = [cache / commit]
    if not (homes[0] / "tree").is_dir():
        _copy(homes[0], git("archive", commit, *PARTS))
    package = homes[0] / "tree" / "speciarl_jax"
    policy = next(
        (p for p in (package / "convert" / "tiny_policy", package / "tiny_policy") if p.is_dir()),
        package,
    )
    if not (policy / "config.json").is_file():
        raise ValueError(f"--base={base}: no speciarl_jax/tiny_policy in it; give a later commit")
    packed = pack_working_tree()
    homes.append(cache / f"tree-{hashlib.sha256(packed).hexdigest()[:12]}")
    for old in set(cache.glob("tree-*")) - {homes[1]}:
        shutil.rmtree(old)  # of a working tree that is no more
    if not (homes[1] / "tree").is_dir():
        _copy(homes[1], packed)
    programs = cache / f"programs-{machine_key()}"
    labels = (f"base {commit[:8]}", "working tree")
    trees = [Tree(*pair, policy, programs) for pair in zip(labels, homes, strict=True)]
    return trees[0], trees[1]


def pack_working_tree() -> bytes:
    """A tar file of it; equal contents give equal bytes."""
    names = git("ls-files", "-z", "-co", "--exclude-standard", "--", *PARTS).decode().split("\0")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted(set(filter(None, names))):
            if (ROOT / name).is_file():  # git lists what was deleted too
                info, content = tarfile.TarInfo(name), (ROOT / name).read_bytes()
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _copy(home: pathlib.Path, packed: bytes) -> None:
    """Unpacks a tar file to home/tree, whole or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        shutil.copytree(folder, home / "tree.part", dirs_exist_ok=True)
    (home / "tree.part").rename(home / "tree")


def entry_point(tree: pathlib.Path) -> tuple[str, str]:
    """(module, function) behind the command `speciarl` of a tree.

    Raises:
        ValueError: its setup.py names none.
    """
    found = re.search(r"speciarl=([\w.]+):(\w+)", (tree / "setup.py").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{tree / 'setup.py'}: expected the console script speciarl=MODULE:NAME")
    return found[1], found[2]


def machine_key() -> str:
    """Bits are compared on one kind of machine, with the same packages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [platform.machine(), sys.version, str(cores)]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags"))})
    facts += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


# Running.


def recipe_key(run: Run) -> str:
    """Of all that decides a run's numbers but its tree; a result with another one is stale."""
    ignored = ("acts", "differs")
    fields = {k: v for k, v in dataclasses.asdict(run).items() if k not in ignored}
    content = json.dumps([fields, machine_key(), ENVIRONMENT], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def result_of(tree: Tree, run: Run, keep: pathlib.Path | None) -> tuple[Evidence, bool]:
    """What a run leaves, and whether it had to be run now.

    Raises:
        RunFailedError: see `train`.
    """
    file = tree.home / f"{run.name}.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("key") == recipe_key(run):
            return Evidence(**content), False
    with contextlib.ExitStack() as stack:
        folder = keep
        if folder is None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workdir = folder / tree.label.replace(" ", "-") / run.name
        shutil.rmtree(workdir, ignore_errors=True)
        seconds = train(tree, run, workdir)
        found = read_evidence(workdir, seconds)
    whole = file.with_suffix(".part")
    content = {"key": recipe_key(run), **dataclasses.asdict(found)}
    whole.write_text(json.dumps(content), encoding="utf-8")
    whole.replace(file)
    return found, True


def read_evidence(workdir: pathlib.Path, seconds: float) -> Evidence:
    """What a finished run left in its directory."""
    evals = sorted(workdir.glob("eval/*/metrics.json"))
    rollouts = sorted(workdir.glob("rollouts/step_*.jsonl"))
    return Evidence(
        _read_lines(workdir / "metrics.jsonl"),
        {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in evals},
        {file.stem: _read_lines(file) for file in rollouts},
        round(seconds, 1),
    )


def _read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def train(tree: Tree, run: Run, workdir: pathlib.Path) -> float:
    """`speciarl train`, in one or several processes, once or stopped and resumed; seconds.

    Raises:
        RunFailedError: a process fails, takes longer than the limit, or stops at another step.
    """
    log = tree.home / f"{run.name}.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    if run.stop_at:
        _join(tree, run, _start(tree, run, workdir, run.stop_at, log), log)
        done = len(_read_lines(workdir / "metrics.jsonl"))
        if done != run.stop_at:
            raise RunFailedError(f"{done} rows before the resume, expected {run.stop_at}")
    resume = ["--resume"] if run.stop_at else []
    _join(tree, run, _start(tree, run, workdir, run.num_steps, log, *resume), log)
    return time.monotonic() - start


def _start(
    tree: Tree, run: Run, workdir: pathlib.Path, num_steps: int, log: pathlib.Path, *flags: str
) -> list[subprocess.Popen[bytes]]:
    copy = tree.home.resolve() / "tree"
    words = [sys.executable, "-c", LAUNCHER, str(copy), *entry_point(copy), "train"]
    words += [f"--config={copy / 'configs' / run.recipe}", f"--workdir={workdir.resolve()}"]
    settings = {
        **run.settings,
        "train.num_steps": str(num_steps),
        "model.path": str(tree.policy.resolve()),
        "data.data_dir": str(tree.home.resolve() / "data"),
        "compile_cache_dir": str(tree.programs.resolve()),
    }
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    dropped = ("JAX_", "XLA_", "SPECIARL_", "WANDB_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | ENVIRONMENT
    environment |= {"PYTHONPATH": str(copy), "PYTHONUNBUFFERED": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={run.devices}"
    port, jobs = free_port(), []
    for index in range(run.processes):
        place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={run.processes}"]
        place = [*place, f"--process_id={index}"] if run.processes > 1 else []
        with log.open("ab") as file:
            job = subprocess.Popen(
                [*words, *flags, *place], cwd=copy, env=environment, stdout=file, stderr=file
            )
        jobs.append(job)
    return jobs


def _join(tree: Tree, run: Run, jobs: Sequence[subprocess.Popen[bytes]], log: pathlib.Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for job in jobs:
            code = job.wait(timeout=max(0.0, deadline - time.monotonic()))
            if code:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RunFailedError(f"exit code {code}: {' '.join(last)} (all of it in {log})")
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{tree.label}: not done after {TIMEOUT_S} s; see {log}") from None
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
