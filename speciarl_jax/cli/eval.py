"""`speciarl eval`: which weights to score, with which judge, and how the result is shown."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

from speciarl_jax.cli.flags import Verbs, add_config, add_processes, join_job
from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.config.schema import Config
from speciarl_jax.scoring.results import Evaluation


def register(verbs: Verbs) -> None:
    """Adds the verb `eval`."""
    evaluate = verbs.add_parser("eval", help="score a checkpoint, or predictions that exist")
    add_config(evaluate)
    add_processes(evaluate)
    evaluate.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, a step of --workdir, base, an HF directory or a PEFT adapter directory",
    )
    evaluate.add_argument("--samples", type=int, default=0, help="answers per image")
    evaluate.add_argument("--predictions", default="", help="score this JSONL file instead")
    evaluate.add_argument(
        "--text_metrics", action="store_true", help="also score the words, without a judge"
    )
    evaluate.add_argument(
        "--text_model",
        default="",
        help="similarity for --text_metrics: minilm, or a sentence model's directory",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    evaluate.set_defaults(handler=run)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What the command line adds to a recipe.

    The checkpoint is latest, a step of the run, base (the recipe's own model), or a directory: a
    Hugging Face model, or a PEFT adapter that is put onto the recipe's model.
    """

    checkpoint: str = "latest"
    samples: int = 0  # answers per image; 0 takes ``eval.samples``
    predictions: str = ""  # score this file instead of sampling; "" samples
    has_text_metrics: bool = False  # see `scoring.text_metrics`
    text_model: str = ""  # see `scoring.sentence_model`; "" for inclusion only
    is_json: bool = False


def run(args: argparse.Namespace) -> int:
    """`speciarl eval`."""
    config, recipe_dir = load_recipe(args.config, args.overrides)
    options = EvalOptions(
        checkpoint=args.checkpoint,
        samples=args.samples,
        predictions=args.predictions,
        has_text_metrics=args.text_metrics,
        text_model=args.text_model,
        is_json=args.json,
    )
    join_job(args, config)
    return score(config, args.workdir, options, recipe_dir)


def score(
    config: Config,
    workdir: pathlib.Path | str,
    options: EvalOptions,
    recipe_dir: pathlib.Path | None,
) -> int:
    """Scores a checkpoint or existing predictions; returns the exit code.

    Several processes sample and judge together; the first writes and prints. `workdir` is a run
    directory or its address, or a fresh one for a model or adapter directory.

    Raises:
        ValueError: no such checkpoint, file or text model, or options that contradict each other.
        Stopped: by SIGTERM or Ctrl-C; the same command goes on.
    """
    import jax

    from speciarl_jax.devices import processes
    from speciarl_jax.evaluate import score_checkpoint, score_file, write_scores
    from speciarl_jax.judge.runner import open_judge
    from speciarl_jax.run.out_of_memory import told_memory
    from speciarl_jax.run.preemption import StepAbandoned, stop_signal
    from speciarl_jax.run.session import enable_compile_cache
    from speciarl_jax.run.storage import open_run_dir
    from speciarl_jax.scoring.predictions import read_predictions
    from speciarl_jax.scoring.sentence_model import open_embedder
    from speciarl_jax.scoring.text_metrics import score_text

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
    place = (jax.process_index(), jax.process_count())
    with stop_signal() as stop:
        try:
            # Answers are kept image by image, so a stop may come at any moment.
            with (
                stop.at_once(),
                told_memory(config),
                open_judge(config.judge, run_dir.local, 2**31, *place) as judge,
            ):
                if options.predictions:
                    source = pathlib.Path(options.predictions)
                    metrics, folder = score_file(config, judge, source, run_dir.local)
                else:
                    metrics, folder = score_checkpoint(
                        config, judge, run_dir, options.checkpoint, options.samples, recipe_dir
                    )
        except StepAbandoned:
            run_dir.push()
            raise stop.error(f"; what is scored is kept in {workdir}") from None
    if options.has_text_metrics and processes.is_first():
        rows = read_predictions(folder / "predictions.jsonl")
        text = score_text(rows, embedder, config.eval.bootstrap_samples)
        metrics = write_scores(config, folder, text)
    run_dir.push()
    if processes.is_first():
        _show(metrics, options)
    return 0


def _show(metrics: Evaluation, options: EvalOptions) -> None:
    from speciarl_jax.monitor.tables import make_console
    from speciarl_jax.report.tables import metrics_table, text_table

    if options.is_json:
        print(json.dumps(metrics, allow_nan=False))
        return
    console = make_console()
    console.print(metrics_table(metrics, "scores"))
    if "text" in metrics:
        console.print(text_table(metrics["text"], "without a judge"))
