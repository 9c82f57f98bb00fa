"""`speciarl eval`: which weights to score, with which judge, and how the result is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from rich.console import Console

from speciarl_jax.config import Config
from speciarl_jax.evaluate import evaluate, retry_failed, write_scores
from speciarl_jax.export_run import restore_parts
from speciarl_jax.predictions import read_predictions
from speciarl_jax.report.tables import metrics_table
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import open_session
from speciarl_jax.train import open_judge


def run(
    config: Config,
    workdir: pathlib.Path,
    *,
    checkpoint: str,
    samples: int,
    predictions: str,
    is_json: bool,
    recipe_dir: pathlib.Path,
) -> int:
    """Scores a checkpoint or existing predictions; returns the exit code.

    Args:
        config: recipe; its data and eval sections decide what is sampled.
        workdir: a run directory, or a fresh one for ``--checkpoint=HF_DIR``.
        checkpoint: latest, a step number, or a model directory.
        samples: answers per image; 0 takes ``eval.samples``.
        predictions: score this file instead of sampling.
        is_json: print one JSON object instead of a table.
        recipe_dir: folder of the recipe.

    Raises:
        ValueError: no such checkpoint or file.
    """
    config.validate()
    workdir.mkdir(parents=True, exist_ok=True)
    if not config.eval.use_train_judge:
        config.judge = config.eval.judge
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(open_judge(config.judge, workdir, 2**31))
        if predictions:
            metrics = _score_file(config, judge, pathlib.Path(predictions), workdir)
        else:
            metrics = _score_checkpoint(config, judge, workdir, checkpoint, samples, recipe_dir)
    if is_json:
        print(json.dumps(metrics, allow_nan=False))
    else:
        Console().print(metrics_table(metrics, "scores"))
    return 0


def _score_file(
    config: Config, judge: Any, source: pathlib.Path, workdir: pathlib.Path
) -> dict[str, Any]:
    """Judges rows without a category in a copy of the file, then scores it."""
    read_predictions(source)  # a bad line is reported before anything is written
    out_dir = workdir / "eval" / source.stem
    out_dir.mkdir(parents=True, exist_ok=True)
    copy = out_dir / "predictions.jsonl"
    if not (copy.exists() and copy.samefile(source)):
        shutil.copyfile(source, copy)
    retry_failed(copy, judge)
    return write_scores(config, copy, out_dir)


def _score_checkpoint(
    config: Config,
    judge: Any,
    workdir: pathlib.Path,
    checkpoint: str,
    samples: int,
    recipe_dir: pathlib.Path,
) -> dict[str, Any]:
    is_directory = checkpoint != "latest" and not checkpoint.isdigit()
    if is_directory:
        config.model.path = checkpoint
        name = pathlib.Path(checkpoint).name
    session = open_session(config, recipe_dir)
    parts = session.parts
    if not is_directory:
        step = int(checkpoint) if checkpoint.isdigit() else None
        parts = restore_parts(session, workdir, step)
        name = f"step_{step:06d}" if step is not None else "latest"
    count = samples or config.eval.samples
    name = f"{name}_n{count}" if count > 1 else name
    settings = config.eval
    sampling = Sampling(settings.temperature, settings.top_p)
    if count > 1 and settings.temperature == 0:
        sampling = Sampling(settings.best_of_temperature, settings.best_of_top_p)
    return evaluate(
        dataclasses.replace(session, parts=parts),
        (parts.trainable, parts.frozen),
        judge,
        workdir / "eval" / name,
        samples=count,
        sampling=sampling,
        image_root=workdir,
    )
