"""`speciarl eval`: which weights to score, with which judge, and how the result is shown."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib

import jax
from etils import epath
from rich.console import Console

from speciarl_jax import hosts
from speciarl_jax.config import Config
from speciarl_jax.convert import adapter
from speciarl_jax.evaluate import STEP_PREFIX, evaluate, retry_failed, write_scores
from speciarl_jax.export_run import open_adapter, restore_parts
from speciarl_jax.files import write_whole
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.metrics import make_console
from speciarl_jax.predictions import read_predictions
from speciarl_jax.report.tables import metrics_table, text_table
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import Session, enable_compile_cache, open_session
from speciarl_jax.storage import RunDir, open_run_dir
from speciarl_jax.text_metrics import score_text
from speciarl_jax.text_model import open_embedder
from speciarl_jax.train import open_judge
from speciarl_jax.types import Metrics


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What the command line adds to a recipe.

    Attributes:
        checkpoint: latest, a step of the run, base (the recipe's own model), or a directory: a
            Hugging Face model, or a PEFT adapter that is put onto the recipe's model.
        samples: answers per image; 0 takes ``eval.samples``.
        predictions: score this file instead of sampling; "" samples.
        has_text_metrics: also score without a judge, see `text_metrics`.
        text_model: embeddings for them, see `text_model.open_embedder`; "" for inclusion only.
        is_json: print one JSON object instead of a table.
    """

    checkpoint: str = "latest"
    samples: int = 0
    predictions: str = ""
    has_text_metrics: bool = False
    text_model: str = ""
    is_json: bool = False


def run(
    config: Config,
    workdir: pathlib.Path | str,
    options: EvalOptions,
    recipe_dir: pathlib.Path | None,
) -> int:
    """Scores a checkpoint or existing predictions; returns the exit code.

    Several processes sample and judge together; the first writes and prints.

    Args:
        config: recipe; its data and eval sections decide what is sampled.
        workdir: a run directory or its address, or a fresh one for a model or adapter directory.
        options: see `EvalOptions`.
        recipe_dir: folder of the recipe.

    Raises:
        ValueError: no such checkpoint, file or text model, or options that contradict each other.
    """
    config.validate()
    enable_compile_cache(config.compile_cache_dir)
    if options.samples < 0:
        raise ValueError(f"--samples={options.samples}: expected answers per image, 1 or more")
    if options.text_model and not options.has_text_metrics:
        raise ValueError("--text_model embeds for --text_metrics: give that too")
    if options.predictions and jax.process_count() > 1:
        raise ValueError("--predictions: a file is scored by one process, not by several")
    embedder = open_embedder(options.text_model) if options.text_model else None
    run_dir = open_run_dir(workdir, jax.process_index(), only=("eval", "thumbnails"))
    run_dir.local.mkdir(parents=True, exist_ok=True)
    run_dir.pull()
    if not config.eval.use_train_judge:
        config.judge = config.eval.judge
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(open_judge(config.judge, run_dir.local, 2**31))
        if options.predictions:
            source = pathlib.Path(options.predictions)
            metrics, folder = _score_file(config, judge, source, run_dir.local)
        else:
            metrics, folder = _score_checkpoint(config, judge, run_dir, options, recipe_dir)
    if options.has_text_metrics and hosts.is_first():
        file, settings = folder / "predictions.jsonl", config.eval
        text = score_text(read_predictions(file), embedder, settings.bootstrap_samples, config.seed)
        metrics = write_scores(config, file, folder, text)
    run_dir.push()
    if hosts.is_first():
        _show(metrics, options)
    return 0


def _show(metrics: Metrics, options: EvalOptions) -> None:
    if options.is_json:
        print(json.dumps(metrics, allow_nan=False))
        return
    console = make_console()
    console.print(metrics_table(metrics, "scores"))
    if "text" in metrics:
        console.print(text_table(metrics["text"], "without a judge"))


def _score_file(
    config: Config, judge: JudgeThread, source: pathlib.Path, workdir: pathlib.Path
) -> tuple[Metrics, pathlib.Path]:
    """Judges rows without a category in a copy of the file, then scores it."""
    read_predictions(source)  # a bad line is reported before anything is written
    out_dir = workdir / "eval" / source.stem
    out_dir.mkdir(parents=True, exist_ok=True)
    copy = out_dir / "predictions.jsonl"
    if not (copy.exists() and copy.samefile(source)):
        write_whole(copy, source.read_bytes())
    retry_failed(copy, judge)
    return write_scores(config, copy, out_dir), out_dir


def _score_checkpoint(
    config: Config,
    judge: JudgeThread,
    run_dir: RunDir,
    options: EvalOptions,
    recipe_dir: pathlib.Path | None,
) -> tuple[Metrics, pathlib.Path]:
    session, name, weights, step = open_checkpoint(
        config, run_dir.checkpoints, options.checkpoint, recipe_dir
    )
    settings = config.eval
    count = options.samples or settings.samples
    sampling = Sampling(settings.temperature, settings.top_p)
    if count > 1 and settings.temperature == 0:
        sampling = Sampling(settings.best_of_temperature, settings.best_of_top_p)
    out_dir = run_dir.local / "eval" / (f"{name}_n{count}" if count > 1 else name)
    metrics = evaluate(
        session,
        session.local_states(session.parts.trainable),
        judge,
        out_dir,
        samples=count,
        sampling=sampling,
        image_root=run_dir.local,
        console=Console(stderr=True, highlight=False, quiet=not hosts.is_first()),
        prompt_step=step,
        weights=weights,
    )
    return metrics, out_dir


def open_checkpoint(
    config: Config, folder: epath.PathLike, checkpoint: str, recipe_dir: pathlib.Path | None
) -> tuple[Session, str, str, int]:
    """Opens the weights that ``--checkpoint`` names; see `EvalOptions`.

    Args:
        config: recipe.
        folder: checkpoints of the run.
        checkpoint: which weights.
        recipe_dir: folder of the recipe.

    Returns:
        The session with these weights, the name of the evaluation's folder, the name of the
        weights for `evaluate` ("" for the run's own), and their training step.

    Raises:
        ValueError: no such checkpoint, or a directory that is neither a model nor an adapter.
    """
    if checkpoint == "base":
        return open_session(config, recipe_dir), "base", "", 0
    if checkpoint == "latest" or checkpoint.isdigit():
        session = open_session(config, recipe_dir)
        wanted = int(checkpoint) if checkpoint.isdigit() else None
        parts, step = restore_parts(session, folder, wanted)
        session = dataclasses.replace(session, parts=parts)
        return session, f"{STEP_PREFIX}{step:06d}", "", step
    directory = pathlib.Path(checkpoint)
    if (directory / adapter.CONFIG_FILE).is_file():
        session = open_adapter(config, directory, recipe_dir)
    elif (directory / "config.json").is_file():
        config.model.path = checkpoint
        session = open_session(config, recipe_dir)
    else:
        raise ValueError(
            f"--checkpoint={checkpoint}: expected latest, base, a step number, a Hugging Face "
            f"model directory (config.json) or a PEFT adapter directory ({adapter.CONFIG_FILE})"
        )
    return session, directory.resolve().name, _directory_weights(directory), 0


def _directory_weights(directory: pathlib.Path) -> str:
    """Path and age of the weights: an export into the same directory is another policy."""
    newest = max((f.stat().st_mtime_ns for f in directory.glob("*.safetensors")), default=0)
    return f"{directory.resolve()} of {newest}"
