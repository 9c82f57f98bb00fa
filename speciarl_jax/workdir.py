"""The work directory of a run: fresh, resumed or overwritten, never mixed up."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from speciarl_jax.config import Config


def prepare_workdir(
    workdir: pathlib.Path, config: Config, *, resume: bool, overwrite: bool
) -> None:
    """Creates or checks the work directory and writes ``config.json``.

    Raises:
        ValueError: in use and neither flag given; resume without a run; another recipe.
    """
    marker = workdir / "config.json"
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them")
    if marker.is_file() and not (resume or overwrite):
        raise ValueError(
            f"--workdir={workdir}: holds a run already; use --resume to go on with it, "
            "--overwrite to delete it, or another directory"
        )
    if overwrite and workdir.is_dir():
        _delete_run(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if resume and marker.is_file():
        _check_same_recipe(json.loads(marker.read_text()), settings, marker)
    marker.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


_RUN_ENTRIES = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "rollouts",
    "eval",
    "plots",
    "tensorboard",
    "thumbnails",
    "verdicts.sqlite",
    "judge_cache.sqlite",
    "report.html",
)


def _delete_run(workdir: pathlib.Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in the folder."""
    for name in _RUN_ENTRIES:
        entry = workdir / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            for file in workdir.glob(f"{name}*"):
                file.unlink()


# What may change between a run and its continuation without changing its numbers.
_FREE = (
    "num_steps",
    "table_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "keep_every_hours",
    "eval_every",
)


def _check_same_recipe(old: dict[str, Any], new: dict[str, Any], marker: pathlib.Path) -> None:
    for section, values in new.items():
        if section in ("judge", "eval", "mesh", "logging", "compile_cache_dir"):
            continue
        before = old.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            changed = [k for k, v in values.items() if k not in _FREE and before.get(k) != v]
            if changed:
                field = changed[0]
                raise ValueError(
                    f"--resume with another recipe: {section}.{field} was {before.get(field)!r} in "
                    f"{marker}, is {values[field]!r} now; use the old value or another --workdir"
                )
        elif before != values:
            raise ValueError(
                f"--resume with another recipe: {section} was {before!r} in {marker}, is "
                f"{values!r} now; use the old value or another --workdir"
            )
