"""The work directory of a run: fresh, resumed or overwritten, never mixed up."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
import shutil

from speciarl_jax.config.old_runs import without_dropped
from speciarl_jax.config.schema import Config
from speciarl_jax.devices import processes
from speciarl_jax.files import name_when_whole, read_json, write_whole
from speciarl_jax.run.storage import RunDir
from speciarl_jax.types import JsonObject

MEND_CONFIG = (
    "put the config.json of another run of the recipe there, or start again with --overwrite"
)


def prepare_workdir(
    run_dir: RunDir, config: Config, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Creates or checks the work directory and writes ``config.json``.

    `resume` goes on with the run there, which on object storage is fetched; `overwrite` deletes it.

    Raises:
        ValueError: in use and neither flag given; resume without a run; another recipe, or half a
            ``config.json``.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them")
    address = run_dir.checkpoints.parent
    if resume and not run_dir.holds_run():
        raise ValueError(f"--workdir={address}: no run there; leave --resume out to start one")
    if run_dir.holds_run() and not (resume or overwrite):
        raise ValueError(
            f"--workdir={address}: holds a run already; use --resume to go on "
            "with it, --overwrite to delete it, or another directory"
        )
    workdir = run_dir.local
    if overwrite:
        _delete_run(workdir)
        run_dir.delete_remote(is_of_run)
    workdir.mkdir(parents=True, exist_ok=True)
    run_dir.pull()
    marker = workdir / "config.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if resume and marker.is_file():
        before = without_dropped(read_json(marker, MEND_CONFIG), str(marker))
        _check_same_recipe(before, settings, marker)
    write_whole(marker, json.dumps(settings, indent=1) + "\n")
    run_dir.push()


_RUN_ENTRIES = (
    "config.json",
    "metrics.jsonl",
    "heartbeat*.json",
    "checkpoints",
    "rollouts",
    "eval",
    "plots",
    "profile",
    "tensorboard",
    "thumbnails",
    "verdicts*.sqlite*",
    "judge_cache*.sqlite*",
    "report.html",
)


def is_of_run(name: str) -> bool:
    """Whether a run writes a folder or file of this name, half-written ones included."""
    return any(fnmatch.fnmatch(name_when_whole(name), pattern) for pattern in _RUN_ENTRIES)


def _delete_run(workdir: pathlib.Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in the folder."""
    entries = workdir.iterdir() if workdir.is_dir() else ()
    for entry in [entry for entry in entries if is_of_run(entry.name)]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# What may change between a run and its continuation. None changes the numbers of a step, but that
# a decaying schedule is stretched to the new num_steps.
_FREE = ("num_steps", "table_every", "save_every", "keep_checkpoints", "keep_best", "eval_every")


def _check_same_recipe(old: JsonObject, new: JsonObject, marker: pathlib.Path) -> None:
    for section, values in new.items():
        if section in ("judge", "eval", "mesh", "logging", "compile_cache_dir"):
            continue
        before = old.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            fields = [
                (f"{section}.{k}", before.get(k), v) for k, v in values.items() if k not in _FREE
            ]
        else:
            fields = [(section, before, values)]
        for field, was, now in fields:
            if was != now:
                raise ValueError(
                    f"--resume with another recipe: {field} was {was!r} in {marker}, is {now!r} "
                    "now; use the old value or another --workdir"
                )


def claim_workdir(run_dir: RunDir, config: Config, *, resume: bool, overwrite: bool) -> None:
    """`prepare_workdir` by the first process; all of them end if it refuses.

    Raises:
        ValueError: see `prepare_workdir`.
    """
    problem = None
    if processes.is_first():
        try:
            prepare_workdir(run_dir, config, resume=resume, overwrite=overwrite)
        except ValueError as error:
            problem = str(error)
    problem = processes.from_first(problem)
    if problem is not None:
        raise ValueError(problem)
    if not processes.is_first():
        run_dir.pull()
