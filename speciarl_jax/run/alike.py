"""The processes of a job start alike or not at all: same package, same jax, same recipe."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from speciarl_jax.config.schema import Config
from speciarl_jax.devices import processes
from speciarl_jax.errors import EXPECTED

_PACKAGES = ("jax", "jaxlib", "libtpu")
_SHOWN = 3  # differences in one line


def check_alike(config: Config) -> None:
    """Compares this process with the others of its job, before any of them touches a device.

    Raises:
        ValueError: they differ, in all processes; names what, and on which of them.
    """
    told = processes.exchange_before_devices("facts", json.dumps(own_facts(config)))
    found = differences([json.loads(text) for text in told])
    if found:
        more = f" and in {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"the processes of this job differ: {'; '.join(found[:_SHOWN])}{more}; install the "
            "same everywhere (tpu_scripts/setup.sh) and give all of them the same recipe"
        )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What is wrong on one host, before the run is opened, ends the whole job with its line.

    Raises:
        ValueError: something is wrong on another host.
        ValueError, OSError, JudgeError: it is wrong here.
    """
    problem: BaseException | None = None
    try:
        yield
    except EXPECTED as error:
        problem = error
    told = processes.exchange_before_devices("problem", "" if problem is None else str(problem))
    if problem is not None:
        raise problem
    found = [f"process {index}: {text}" for index, text in enumerate(told) if text]
    if found:
        raise ValueError(found[0])


def own_facts(config: Config) -> dict[str, str]:
    """What has to be the same in all processes, by name: the code, versions, fields of a recipe."""
    facts = {"speciarl-jax": f"{_version('speciarl-jax')} with files {source_digest()}"}
    facts |= {name: _version(name) for name in _PACKAGES}
    return facts | {
        f"{section}.{field}" if field else section: repr(value)
        for section, values in dataclasses.asdict(config).items()
        for field, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Where processes differ, a phrase for each fact.

    Args:
        facts: of each process, in process order; another version may know other fields.
    """
    phrases = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values = [fact.get(name, "unknown") for fact in facts]
        usual = collections.Counter(values).most_common(1)[0][0]  # of equally many: process 0's
        others: dict[str, list[str]] = {}
        for index, value in enumerate(values):
            if value != usual:
                others.setdefault(value, []).append(str(index))
        parts = [f"{value} on process {', '.join(at)}" for value, at in others.items()]
        if parts:
            phrases.append(f"{name} is {', '.join(parts)} and {usual} on the others")
    return phrases


def source_digest() -> str:
    """A short hash of the installed package's files, which needs no git where it runs."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
