"""The work directory of a run: fresh, resumed or overwritten, never mixed up."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Literal, TypeAlias

import jax

from speciarl_jax.config.old_runs import without_dropped
from speciarl_jax.config.schema import Config
from speciarl_jax.devices import processes
from speciarl_jax.files import name_when_whole, read_json, write_whole
from speciarl_jax.run.storage import RunDir
from speciarl_jax.types import JsonObject

Resume: TypeAlias = bool | Literal["auto"]  # auto: if the directory holds a run
MEND_CONFIG = (
    "put the config.json of another run of the recipe there, or start again with --overwrite"
)


def prepare_workdir(
    run_dir: RunDir,
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    new_judge: bool = False,
) -> None:
    """Creates or checks the work directory and writes ``config.json``.

    `resume` goes on with the run there, which on object storage is fetched; `overwrite` deletes it.
    `new_judge` lets a resumed run have another judge than it began with.
    A start that left no checkpoint, metrics row or score is nobody's run and needs neither.

    Raises:
        ValueError: holds a run and neither flag given; resume without a run; another recipe, or
            half a ``config.json``.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them")
    address = run_dir.checkpoints.parent
    if resume and not run_dir.was_started():
        raise ValueError(f"--workdir={address}: no run there; leave --resume out to start one")
    if not (resume or overwrite) and run_dir.holds_run():
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
        _check_same_judge(before, settings, marker, new_judge=new_judge)
        _warn_of_stretch(before, settings)
    write_whole(marker, json.dumps(settings, indent=1) + "\n")
    run_dir.push()


_LABELS = ("judge_cache", "verdicts")  # paid for: a failed start leaves them
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
# a decaying schedule is stretched to the new num_steps, and that sums are rounded in another order.
_FREE = (
    *("num_steps", "table_every", "save_every", "keep_checkpoints", "keep_best", "eval_every"),
    *("remat", "prompts_per_micro_batch", "micro_batch_tokens", "logprob_chunk_tokens"),
    "max_cache_mb",
)
# What a label means. How the judge is reached, how fast, and where labels are kept, is free.
_JUDGE = (
    *("kind", "taxonomy", "model", "model_revision", "prompt", "thinking", "temperature", "voters"),
    *("has_cascade", "synonyms", "max_answer_chars"),
)
_DECAYING = ("linear", "cosine")


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


def _check_same_judge(
    old: JsonObject, new: JsonObject, marker: pathlib.Path, *, new_judge: bool
) -> None:
    before, now = old.get("judge"), new["judge"]
    if not isinstance(before, dict) or not isinstance(now, dict):
        return
    changed = [name for name in _JUDGE if before.get(name, now[name]) != now[name]]
    for name in changed:
        line = f"judge.{name} was {before[name]!r} in {marker}, is {now[name]!r} now"
        if not new_judge:
            raise ValueError(
                f"--resume with another judge: {line}; rewards would mean something else from here "
                "on: use the old value or another --workdir, or add --new_judge"
            )
        print(f"warning: {line}: rewards mean something else from here on", file=sys.stderr)


def _warn_of_stretch(old: JsonObject, new: JsonObject) -> None:
    """A decaying learning rate ends with the last step: more steps change it at once."""
    optim, train, before = new["optim"], new["train"], old.get("train")
    if not (isinstance(optim, dict) and isinstance(train, dict) and isinstance(before, dict)):
        return
    was, now = before.get("num_steps"), train["num_steps"]
    if optim["schedule"] in _DECAYING and was != now:
        print(
            f"warning: train.num_steps was {was}, is {now}: optim.schedule={optim['schedule']} is "
            "stretched to it, so the learning rate jumps here and differs from that of a run with "
            f"{now} steps from the start; optim.schedule=constant does not",
            file=sys.stderr,
        )


@contextlib.contextmanager
def claimed_workdir(
    run_dir: RunDir,
    config: Config,
    resume: Resume = False,
    overwrite: bool = False,
    new_judge: bool = False,
) -> Iterator[bool]:
    """Holds a run directory, prepared by the first process, for the time of a run.

    A fresh start that fails before there is anything to lose leaves nothing but labels.

    Args:
        run_dir: where the run is kept.
        config: the recipe.
        resume: see `prepare_workdir`; "auto": whether the directory holds a run decides. The first
            process looks, while it holds the directory, and tells the others.
        overwrite: see `prepare_workdir`.
        new_judge: see `prepare_workdir`.

    Yields:
        Whether the run is resumed; the same in all processes.

    Raises:
        ValueError: see `prepare_workdir`, in all processes; or another process trains there.
    """
    with contextlib.ExitStack() as stack:
        problem, is_resumed, before = "", resume is True, set[str]()
        if processes.is_first():
            try:
                stack.enter_context(run_dir.hold())
                before = set() if overwrite else _entries(run_dir)
                if resume == "auto":
                    is_resumed = overwrite or run_dir.holds_run()  # both flags: refused below
                flags = {"resume": is_resumed, "overwrite": overwrite, "new_judge": new_judge}
                prepare_workdir(run_dir, config, **flags)
            except (ValueError, OSError) as error:
                if jax.process_count() == 1:
                    raise
                problem = str(error)
        problem, is_resumed = processes.from_first((problem, is_resumed))
        if problem:
            raise ValueError(problem)
        if not processes.is_first():
            run_dir.pull()
        try:
            yield is_resumed
        except BaseException:  # a stop or Ctrl-C, too, must not leave what looks like a run
            is_ours = processes.is_first() and not run_dir.is_lost
            if is_ours and not is_resumed and not run_dir.holds_run():
                made = _entries(run_dir) - before
                run_dir.forget({name for name in made if not name.startswith(_LABELS)})
            raise


def _entries(run_dir: RunDir) -> set[str]:
    return {path.name for path in run_dir.local.iterdir() if is_of_run(path.name)}
