"""Reads run directories for the report.

    metrics.jsonl                one object per step; several objects of one step are merged
    config.json                  the recipe, nested
    eval/<stage>/predictions.jsonl, metrics.json     stage: base, trained, best_of, ...; with
                                                     _sampled: samples of the policy; not read
                                                     are validations, which are in metrics.jsonl
    rollouts/step_000010.jsonl   sampled while training
    verdicts.sqlite              what the judge said, see `report.verdicts`
    predictions.jsonl, metrics.json                  what `speciarl eval` writes: one stage, "eval"
    thumbnails/                  see `thumbnails.save_thumbnail`

Everything is optional, but there must be a metrics.jsonl or one predictions.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import cast

from speciarl_jax.files import read_json
from speciarl_jax.scoring.metrics import metrics_json
from speciarl_jax.scoring.predictions import Prediction, read_predictions
from speciarl_jax.scoring.results import CurvePoint, Evaluation, check_scores
from speciarl_jax.types import JsonObject

Series = dict[str, list[tuple[int, float]]]

# Of evaluations; others stand in between.
_ORDER = {"base": 0, "best_of": 2, "trained": 3, "base_sampled": 4, "trained_sampled": 5}
_VALIDATION = "validation_"  # how the folders of a run's validations begin


@dataclasses.dataclass
class Stage:
    """One evaluation of a run: its rows and its metrics."""

    name: str
    predictions: list[Prediction]
    metrics: Evaluation

    @property
    def in_domain(self) -> list[str]:
        """Data sets that were averaged as ``in_domain``; older files do not say."""
        names = self.metrics.get("settings", {}).get("in_domain", [])
        return [n for n in names if isinstance(n, str)]

    def best_of_curve(self, average: str) -> list[CurvePoint]:
        """What the best of k answers would score; empty where images have one answer."""
        return self.metrics.get("best_of", {}).get("averages", {}).get(average, [])


@dataclasses.dataclass
class Run:
    """Everything the report knows about one run directory."""

    name: str  # short and unique among the runs of a report
    path: Path
    series: Series  # curves of metrics.jsonl, empty without one
    config: JsonObject  # content of config.json, empty without one
    stages: list[Stage]  # evaluations, base first, trained last
    rollouts: list[Prediction]  # sampled while training, in order of steps

    def stage(self, name: str) -> Stage | None:
        """The evaluation of that name, if there is one."""
        return next((s for s in self.stages if s.name == name), None)

    @property
    def final(self) -> Stage | None:
        """The evaluation that speaks for the run: trained, else the last of greedy answers."""
        drawn = ("best_of", "base_sampled", "trained_sampled")
        plain = [s for s in self.stages if s.name not in drawn] or self.stages
        return self.stage("trained") or (plain[-1] if plain else None)

    @property
    def change(self) -> tuple[Stage, Stage] | None:
        """(base, final) where the run has both."""
        base, final = self.stage("base"), self.final
        return None if base is None or final is None or base is final else (base, final)


def _read_object(path: Path, remedy: str) -> JsonObject:
    """Content of a JSON object file; empty if there is none."""
    content: JsonObject = read_json(path, remedy) if path.is_file() else {}
    return content


def read_series(path: str | Path) -> Series:
    """Points (step, value) of every numeric metric of a ``metrics.jsonl``, in order of steps.

    Values that are not finite numbers are skipped. A last line cut short by a kill is ignored; the
    trainer removes it on resume. A later row of the same step and metric replaces the earlier.

    Raises:
        ValueError: no such file, or a bad line (named as ``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such metrics file; is this a run directory?")
    merged: dict[int, dict[str, float]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step, values = _parse_row(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}:{number}: {error}") from None
        merged.setdefault(step, {}).update(values)
    series: Series = {}
    for step in sorted(merged):
        for name, value in merged[step].items():
            series.setdefault(name, []).append((step, value))
    return series


def _parse_row(line: bytes) -> tuple[int, dict[str, float]]:
    row = json.loads(line)
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError("expected a JSON object with an integer 'step' of 0 or more")
    values = {
        name: float(value)
        for name, value in row.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # False for nan; an int may be beyond any float
    }
    return step, values


def load_run(path: str | Path, name: str = "") -> Run:
    """Reads one run directory.

    Args:
        path: the directory, or one evaluation below it (``RUN/eval/base``).
        name: shown in the report; the directory's name if empty.

    Raises:
        ValueError: no such directory, nothing in it, or a file that cannot be read (named).
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    config = _read_object(path / "config.json", "put that of another run of the recipe there")
    in_domain = _in_domain(config)
    series = read_series(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else {}
    stages = [_read_stage(p, p.name, in_domain) for p in _stage_dirs(path)]
    if (path / "predictions.jsonl").is_file():
        stages.append(_read_stage(path, "eval", in_domain))
    stages = [stage for stage in stages if stage.predictions]  # one may have just begun
    if not series and not stages:
        raise ValueError(
            f"{path}: no rows in metrics.jsonl, predictions.jsonl or eval/*/predictions.jsonl; is "
            "this a run directory?"
        )
    rollouts = [p for file in sorted((path / "rollouts").glob("step_*.jsonl"))
                for p in _with_step(read_predictions(file), file)]  # fmt: skip
    return Run(name or path.resolve().name, path, series, config, stages, rollouts)


def load_runs(paths: list[str]) -> list[Run]:
    """Reads several run directories and gives them different names.

    Raises:
        ValueError: as `load_run`.
    """
    names = [Path(p).resolve().name for p in paths]
    runs: list[Run] = []
    for i, path in enumerate(paths):
        name = names[i]
        if names.count(name) > 1:
            name = f"{Path(path).resolve().parent.name}/{name}"
        if name in [r.name for r in runs]:
            name = f"{name} ({i + 1})"
        runs.append(load_run(path, name))
    return runs


def _in_domain(config: JsonObject) -> list[str]:
    data = config.get("data")
    names = data.get("in_domain", []) if isinstance(data, dict) else []
    return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []


def _stage_dirs(path: Path) -> list[Path]:
    folders = [p.parent for p in (path / "eval").glob("*/predictions.jsonl")]
    folders = [f for f in folders if not f.name.startswith(_VALIDATION)]
    return sorted(folders, key=lambda folder: (_ORDER.get(folder.name, 1), folder.name))


def _read_stage(path: Path, name: str, in_domain: list[str]) -> Stage:
    predictions = read_predictions(path / "predictions.jsonl")
    remedy = "delete the file and score again: `speciarl eval`"
    content = _read_object(path / "metrics.json", remedy)
    if "datasets" not in content or "averages" not in content:
        return Stage(name, predictions, metrics_json(predictions, in_domain=in_domain))
    try:
        check_scores(content)
    except ValueError as error:
        raise ValueError(f"{path / 'metrics.json'}: {error}; {remedy}") from error
    return Stage(name, predictions, cast(Evaluation, content))


def _with_step(rows: list[Prediction], file: Path) -> list[Prediction]:
    """Fills in the step from the file's name where the rows do not say it."""
    number = file.stem.removeprefix("step_")
    if not number.isdigit():
        return rows
    return [r if r.step is not None else dataclasses.replace(r, step=int(number)) for r in rows]
