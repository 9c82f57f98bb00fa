"""Flags that several verbs share."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import TYPE_CHECKING, TypeAlias

from speciarl_jax.config.schema import Config

if TYPE_CHECKING:
    Verbs: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Verbs = argparse._SubParsersAction  # no generic class at run time


def parse_workdir(text: str) -> pathlib.Path | str:
    """A folder; an address such as gs://bucket/run stays text, for pathlib would mangle it.

    Raises:
        ArgumentTypeError: nothing; `pathlib` would take the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder or an address; . is the current one")
    return text if "://" in text else pathlib.Path(text)


def parse_natural(text: str) -> int:
    """A whole number of 0 or more.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 0 or more")
    return int(text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Recipe and run directory."""
    add_recipe(parser)
    parser.add_argument("--workdir", required=True, type=parse_workdir, help="run directory")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe alone."""
    parser.add_argument(
        "--config",
        required=True,
        help="recipe: PATH.py or PATH.py:ARGUMENT; --config.section.field=value overrides",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Where the other processes of a job are."""
    processes = parser.add_argument_group(
        "several processes", "one per host; each flag may come from SPECIARL_<NAME> instead"
    )
    processes.add_argument("--coordinator", help="HOST:PORT of process 0")
    processes.add_argument("--num_processes", type=int, help="of the job")
    processes.add_argument("--process_id", type=int, help="of this process, from 0")
    processes.add_argument(
        "--cluster", action="store_true", help="find the others on a TPU pod, GKE, SLURM or MPI"
    )


def join_job(args: argparse.Namespace, config: Config) -> None:
    """Joins a job of several processes if the flags, or SPECIARL_* variables, name one.

    Raises:
        ValueError: see `devices.processes.connect`; or the processes are not alike, see
            `run.alike.check_alike`.
    """
    from speciarl_jax.devices import processes
    from speciarl_jax.run.alike import check_alike

    names = {"coordinator": str, "num_processes": int, "process_id": int}
    given = {}
    for name, parse in names.items():
        value = getattr(args, name)
        text = os.environ.get(f"SPECIARL_{name.upper()}")
        if value is None and text is not None:
            try:
                value = parse(text)
            except ValueError as error:
                raise ValueError(f"SPECIARL_{name.upper()}={text!r}: expected a number") from error
        given[name] = value
    if args.cluster or any(value is not None for value in given.values()):
        processes.connect(**given)
        check_alike(config)
