"""Where numbers go: one readable line a step, JSONL, TensorBoard, W&B, tables of rollouts."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from speciarl_jax.config.schema import Config
from speciarl_jax.data.decode import decode_image
from speciarl_jax.files import write_whole
from speciarl_jax.monitor.tables import outcome_name
from speciarl_jax.types import Rollout

_SHOWN_GROUPS = 4  # sent to TensorBoard and W&B
_IMAGE_PX = 256
_ANSWER_CHARS = 120
NONDETERMINISTIC = (
    *("time/", "throughput/", "goodput/", "memory/", "judge/"),
    "rollout/recompilations",  # a resumed run compiles again
)


def deterministic(row: Mapping[str, float]) -> dict[str, float]:
    """The part of a metrics row that a repeated run reproduces bit for bit on CPU."""
    return {k: v for k, v in row.items() if not k.startswith(NONDETERMINISTIC)}


@runtime_checkable
class WandbRun(Protocol):
    """What is used of a W&B run."""

    def log(self, data: Mapping[str, object], *, step: int) -> None:
        """Sends what belongs to a step."""

    def finish(self) -> None:
        """Sends the rest."""


class MetricsWriter:
    """Appends rows to ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases.

    On resume, rows after a step are cut from the first two; W&B keeps what it was sent.

    Attributes:
        last_row: in the file when it was opened.
    """

    def __init__(
        self, workdir: pathlib.Path, resume_step: int, wandb_run: WandbRun | None = None
    ) -> None:
        """Opens the files; rows of steps after `resume_step` belong to work that was lost.

        `wandb_run`, of `open_wandb`, is finished by `close`.
        """
        from tensorboardX import SummaryWriter

        self._wandb = wandb_run
        self._path = workdir / "metrics.jsonl"
        kept = _cut_rows(self._path, resume_step)
        self.last_row: dict[str, float] = json.loads(kept[-1]) if kept else {}
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """Writes one row; it must hold ``step``. The row is on disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        plain = {name: _plain(value) for name, value in row.items()}
        try:
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # of an open file: it does not say which
            raise OSError(
                f"{self._path}: cannot be written ({error.strerror}); free space there, then "
                "--resume"
            ) from error
        step = int(row["step"])
        finite = {n: float(v) for n, v in plain.items() if n != "step" and v is not None}
        for name, number in finite.items():
            self._board.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def amend(self, more: Mapping[str, float]) -> None:
        """Adds numbers to the last row of a run that is resumed, before any other is written."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        self._file.close()
        write_whole(self._path, "".join(line + "\n" for line in lines[:-1]))
        self._file = self._path.open("a", encoding="utf-8")
        self.write({**self.last_row, **more})

    def write_rollouts(
        self, step: int, groups: Sequence[Sequence[Rollout]], images: Mapping[str, bytes]
    ) -> None:
        """Sends the first groups to TensorBoard and W&B; `images` are encoded, by prompt id."""
        shown = groups[:_SHOWN_GROUPS]
        for number, group in enumerate(shown):
            pixels = _pixels(images[group[0].prompt_id])
            self._board.add_image(f"rollouts/{number}", pixels, step, dataformats="HWC")
            self._board.add_text(f"rollouts/{number}", answers_markdown(group), step)
        if self._wandb is not None:
            self._wandb.log({"rollouts": _wandb_table(shown, images)}, step=step)

    def close(self) -> None:
        """Closes the files and the W&B run."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def open_wandb(config: Config, workdir: pathlib.Path) -> WandbRun | None:
    """The W&B run of a work directory; a resumed run goes on with the same one.

    None if `logging.wandb_project` is empty. The recipe is sent along as the run's settings. W&B
    reads its own environment: WANDB_MODE=offline keeps everything below ``workdir/wandb``.

    Raises:
        ValueError: a project is named and wandb is not installed.
    """
    project = config.logging.wandb_project
    if not project:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project={project!r}: wandb is not installed; pip install "
            "'speciarl-jax[wandb]', or leave the field empty"
        )
    import wandb

    place = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:12]
    run: WandbRun = wandb.init(
        project=project,
        name=f"{config.name} {workdir.name}",
        id=place,
        resume="allow",
        dir=str(workdir),
        config=dataclasses.asdict(config),
    )
    return run


def _pixels(image: bytes) -> np.ndarray:
    """What the model saw, [H, W, 3] uint8, at most 256 px a side."""
    small = decode_image(image, _IMAGE_PX)
    small.thumbnail((_IMAGE_PX, _IMAGE_PX))
    return np.asarray(small)


def _cell(text: str) -> str:
    """Untrusted text inside a Markdown table: one line, no markup, no column break."""
    line = html.escape(" ".join(text.split())[:_ANSWER_CHARS])
    return re.sub(r"([\\|`*_\[\]#~!])", r"\\\1", line)


def answers_markdown(group: Sequence[Rollout]) -> str:
    """Ground truth, then a Markdown table of a group's answers, for TensorBoard's text page."""
    lines = [
        f"{_cell(group[0].ground_truth)} ({_cell(group[0].prompt_id)})",
        "",
        "| answer | category | reward | advantage |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {_cell(r.prediction or '(no answer)')} | {_cell(outcome_name(r))} "
        f"| {r.reward:+.2f} | {r.advantage:+.2f} |"
        for r in group
    ]
    return "\n".join(lines)


def _wandb_table(groups: Sequence[Sequence[Rollout]], images: Mapping[str, bytes]) -> object:
    import wandb

    columns = ["image", "ground truth", "answer", "category", "reward", "advantage", "completion"]
    table = wandb.Table(columns=columns)
    for group in groups:
        picture = wandb.Image(_pixels(images[group[0].prompt_id]))
        for r in group:
            table.add_data(
                picture,
                r.ground_truth,
                r.prediction or "",
                outcome_name(r),
                r.reward,
                r.advantage,
                r.completion,
            )
    return table


def _plain(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if np.isfinite(number) else None


def _cut_rows(path: pathlib.Path, last_step: int) -> list[str]:
    """Keeps whole rows up to a step, and returns them; a half-written last line goes too."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a kill cut short; nothing follows it
        if row["step"] <= last_step:
            kept.append(line)
    write_whole(path, "".join(line + "\n" for line in kept))
    return kept


def read_rows(path: pathlib.Path) -> list[dict[str, float]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
