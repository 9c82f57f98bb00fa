"""ENTRY: samples, judges and scores a policy; also scores predictions that exist already."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import cast

import jax
from flax import nnx
from rich.console import Console

from speciarl_jax.config.schema import Config
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.recipe import open_eval_source, open_validation_source
from speciarl_jax.devices import processes
from speciarl_jax.devices.mesh import num_replicas
from speciarl_jax.devices.processes import Poll
from speciarl_jax.files import read_json, write_whole
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.monitor.live import progress
from speciarl_jax.objective import reward
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.groups import Groups, await_verdicts, collect_groups
from speciarl_jax.rollout.sampling import Sampling, training_sampling
from speciarl_jax.run.restore import STEP_PREFIX, open_checkpoint
from speciarl_jax.run.session import Session
from speciarl_jax.run.storage import RunDir
from speciarl_jax.scoring.bootstrap import MAIN_METRICS, ScoringRule
from speciarl_jax.scoring.metrics import metrics_json
from speciarl_jax.scoring.predictions import (
    Prediction,
    append_predictions,
    cut_half_line,
    from_rollout,
    parse_prediction,
    read_predictions,
    write_predictions,
)
from speciarl_jax.scoring.results import Evaluation, TextMetrics
from speciarl_jax.types import JsonObject, Rollout, Verdict

_EVAL_STEP = 2**30  # folded into the seed: evaluation never shares randomness with training


@dataclasses.dataclass(frozen=True)
class Exam:
    """What is asked, and how it is answered.

    Attributes:
        split: of the evaluation sources.
        num_images: per source, 0 for all.
        samples: answers per image.
        sampling: how they are drawn; temperature 0 is greedy.
        is_validation: sources without this split take its pictures from the training split, which
            does without them.
    """

    split: str
    num_images: int
    samples: int
    sampling: Sampling
    is_validation: bool = False

    @classmethod
    def test(cls, config: Config, samples: int = 0) -> Exam:
        """The pictures that are reported; with `samples`, as many answers of the best-of-N."""
        settings = config.eval
        sampling = Sampling(settings.temperature, settings.top_p)
        if samples:
            sampling = Sampling(settings.best_of_temperature, settings.best_of_top_p)
        data = config.data
        return cls(data.eval_split, data.num_eval, samples or settings.samples, sampling)

    @classmethod
    def validation(cls, config: Config) -> Exam:
        """The pictures that guide a run, answered as in the test."""
        data = config.data
        test = cls.test(config)
        return dataclasses.replace(
            test, split=data.validation_split, num_images=data.num_validation, is_validation=True
        )

    def drawn_as_in_training(self, config: Config) -> Exam:
        """The same pictures, answered by ``eval.policy_samples`` samples of the policy."""
        return dataclasses.replace(
            self, samples=config.eval.policy_samples, sampling=training_sampling(config)
        )


def is_validated(config: Config, step: int) -> bool:
    """Whether a step ends with a validation."""
    every = config.train.eval_every
    return bool(every) and (step == config.train.num_steps or step % every == 0)


def evaluate(
    session: Session,
    states: tuple[nnx.State[str, object], ...],
    judge: JudgeThread,
    out_dir: pathlib.Path,
    exam: Exam,
    *,
    image_root: pathlib.Path,
    console: Console,
    prompt_step: int = 0,
    weights: str = "",
    poll: Poll | None = None,
) -> Evaluation:
    """Samples answers on every evaluation source, has them judged, scores them.

    Batches are appended to ``predictions.jsonl`` as they are judged; a second call goes on where
    the first stopped, retries rows that the judge failed on, and drops none. ``settings.json``
    says what the answers depend on, so that answers of two policies never share a file.

    Args:
        session: model, tokenizer, prompts.
        states: (trainable, frozen) to evaluate.
        judge: labels the answers.
        out_dir: gets ``predictions.jsonl`` and ``metrics.json``.
        exam: what is asked, and how it is answered.
        image_root: run directory; thumbnails for the report go there.
        console: where progress and skipped images are shown.
        prompt_step: training step, for the judge's log.
        weights: names the weights that are scored; "" for the run's own at `prompt_step`.
        poll: called between chunks of work; may raise, what was scored stays.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: `out_dir` holds answers made with other settings.
    """
    config = session.config
    weights = weights or f"{STEP_PREFIX}{prompt_step:06d}"
    path = out_dir / "predictions.jsonl"
    finished: list[tuple[str, str]] = []
    if processes.is_first():
        claim_folder(out_dir, answer_settings(session, exam, weights))
        finished = _finished_images(path, exam.samples, judge)
    done = {(dataset, prompt_id) for dataset, prompt_id in processes.from_first(finished)}
    rollout_config = dataclasses.replace(
        config.rollout, max_completion_tokens=config.eval.max_completion_tokens
    )
    engine = RolloutEngine(
        session.parts.graphdef, rollout_config, session.vocabulary, session.sampling_mesh
    )
    poll = poll or session.agree
    for name in config.data.eval_sources:
        loader = _open_loader(session, name, exam, console)
        total, seen = len(loader.index.kept), 0
        with contextlib.closing(loader), progress(console, f"{out_dir.name}: {name}", total) as at:
            for batch in loader:
                keys = _image_keys(batch)
                rows: list[Prediction] = []
                # Those that sample together go through a batch if one of them has to.
                if session.agree(int(any(key not in done for key in keys))) == (1,):
                    groups = _sample(session, engine, states, judge, batch, exam, prompt_step, poll)
                    rows = _rows(batch, groups, image_root, done)
                _append(path, rows)
                seen += sum(processes.gather_json(len(keys)))
                at(seen)
    scores = write_scores(config, out_dir) if processes.is_first() else None
    return cast(Evaluation, processes.from_first(scores))  # the first process has them


def _finished_images(path: pathlib.Path, samples: int, judge: JudgeThread) -> list[tuple[str, str]]:
    """(data set, prompt id) of the images that an earlier call has scored, mended first."""
    if not path.is_file():
        return []
    cut_half_line(path)
    cut_half_images(path, samples)
    retry_failed(path, judge)
    return sorted({row.image_key for row in read_predictions(path)})


def _append(path: pathlib.Path, rows: list[Prediction]) -> None:
    """The rows of all processes, written by the first."""
    if jax.process_count() > 1:
        everywhere = processes.gather_json([row.to_json() for row in rows])
        rows = [parse_prediction(row) for part in everywhere for row in part]
    if processes.is_first() and rows:
        append_predictions(path, rows)


def answer_settings(session: Session, exam: Exam, weights: str) -> JsonObject:
    """Everything that the answers and labels of an evaluation depend on, as plain JSON values."""
    config = session.config
    judge = config.judge if config.eval.use_train_judge else config.eval.judge
    return {
        "weights": weights,
        "model": config.model.path,
        "prompt": list(session.builder.template.texts),
        "samples": exam.samples,
        "sampling": dataclasses.asdict(exam.sampling),
        "max_completion_tokens": config.eval.max_completion_tokens,
        "sources": list(config.data.eval_sources),
        "split": exam.split,
        "num_eval": exam.num_images,
        "select_seed": config.data.select_seed,
        "seed": config.seed,
        "judge": [judge.kind, judge.model_name, judge.revision, judge.prompt],
    }


def claim_folder(out_dir: pathlib.Path, settings: JsonObject) -> None:
    """Makes an evaluation's folder, or checks that what it holds was made with these settings.

    A run that was resumed with more steps finds its earlier final score there: that folder is
    renamed to ``step_<number>``, which is what it has become.

    Raises:
        ValueError: it holds answers made with other settings, or with unknown ones, or half a
            ``settings.json``.
    """
    file = out_dir / "settings.json"
    if (out_dir / "predictions.jsonl").is_file():
        if not file.is_file():
            raise ValueError(f"{out_dir}: answers without settings.json; delete the folder")
        old = read_json(file, "delete the folder; it is scored again")
        changed = [name for name in settings if old.get(name) != settings[name]]
        before = str(old.get("weights"))
        archive = out_dir.parent / before
        if changed == ["weights"] and before.startswith(STEP_PREFIX) and not archive.exists():
            out_dir.rename(archive)
        elif changed:
            name = changed[0]
            raise ValueError(
                f"{out_dir}: its answers were made with {name}={old.get(name)!r}, now it is "
                f"{settings[name]!r}; use another --workdir or delete the folder"
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=1) + "\n")


def _open_loader(session: Session, name: str, exam: Exam, console: Console) -> PromptLoader:
    """The images of one source, in order; those that cannot be used are named.

    Batches are padded to a multiple of the replicas.
    """
    config = session.config
    if exam.is_validation:
        source = open_validation_source(config.data, name)
    else:
        source = open_eval_source(config.data, name, exam.split, exam.num_images)
    size = min(config.eval.prompts_per_batch, len(source))
    loader = PromptLoader(
        config.data,
        source,
        session.builder,
        size + -size % num_replicas(session.mesh),
        seed=config.seed,
        shuffle=False,
        num_epochs=1,
        process_index=processes.share_index(),
        process_count=processes.num_shares(),
    )
    for skipped in loader.index.skipped:
        console.print(f"skipped {skipped.image_name}: {skipped.reason}", markup=False)
    return loader


def _image_keys(batch: PromptBatch) -> list[tuple[str, str]]:
    pairs = zip(batch.datasets, batch.prompt_ids, batch.is_real, strict=True)
    return [(dataset, prompt_id) for dataset, prompt_id, is_real in pairs if is_real]


def _sample(
    session: Session,
    engine: RolloutEngine,
    states: tuple[nnx.State[str, object], ...],
    judge: JudgeThread,
    batch: PromptBatch,
    exam: Exam,
    prompt_step: int,
    poll: Poll,
) -> Groups:
    """Judged and rewarded groups of the real prompts; none where all of them are padding."""
    batch = session.pad_alike(batch)
    embeds = session.encode(states, batch)
    finished = engine.generate(
        states,
        batch,
        embeds,
        group_size=exam.samples,
        sampling=exam.sampling,
        seed=session.config.seed,
        step=_EVAL_STEP,
        poll=poll,
    )
    groups, pending = collect_groups(
        finished,
        batch,
        exam.samples,
        session.vocabulary,
        judge,
        step=prompt_step,
        policy_version=prompt_step,
    )
    await_verdicts(pending, poll)
    if not groups:
        return groups
    codes = reward.category_codes(groups)
    algo = session.config.algo
    values = reward.rewards(algo.reward, codes, algo.bar_support)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group):
            rollout.reward = float(values[p, g])
    return groups


def _rows(
    batch: PromptBatch,
    groups: Sequence[Sequence[Rollout]],
    image_root: pathlib.Path,
    done: set[tuple[str, str]],
) -> list[Prediction]:
    images = dict(zip(batch.prompt_ids, batch.images, strict=True))
    return [
        from_rollout(r, image=save_thumbnail(image_root, r.prompt_id, images[r.prompt_id]))
        for group in groups
        if (group[0].dataset, group[0].prompt_id) not in done
        for r in group
    ]


def cut_half_images(path: pathlib.Path, samples: int) -> int:
    """Removes the answers to images that a kill left with fewer than `samples` of them.

    They are drawn again, and come out the same. Returns how many rows were removed.
    """
    rows = read_predictions(path)
    counts = collections.Counter(row.image_key for row in rows)
    kept = [row for row in rows if counts[row.image_key] >= samples]
    if len(kept) < len(rows):
        write_predictions(path, kept)
    return len(rows) - len(kept)


def retry_failed(path: pathlib.Path, judge: JudgeThread) -> None:
    """Asks again for rows without a label; new rows replace the old."""
    failed = [row for row in read_predictions(path) if row.is_judge_failure]
    outcomes = judge.label([Pair(row.ground_truth, row.prediction or "") for row in failed])
    labelled = [
        dataclasses.replace(row, category=outcome.category, failure=None)
        for row, outcome in zip(failed, outcomes, strict=True)
        if isinstance(outcome, Verdict)
    ]
    if labelled:
        append_predictions(path, labelled)


def write_scores(
    config: Config, folder: pathlib.Path, text: TextMetrics | None = None
) -> Evaluation:
    """Scores a folder's ``predictions.jsonl`` into its ``metrics.json``, beside `text` if given."""
    metrics = metrics_json(
        read_predictions(folder / "predictions.jsonl"),
        config.data.in_domain,
        ScoringRule(config.eval.format_failures, config.eval.bootstrap_samples),
    )
    if text is not None:
        metrics["text"] = text
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def eval_row(metrics: Evaluation, prefix: str = "eval") -> dict[str, float]:
    """``<prefix>/<data set or average>/<metric>`` of a ``metrics.json``."""
    row = {}
    for group, values in {**metrics["datasets"], **metrics["averages"]}.items():
        for metric in MAIN_METRICS:
            value = values[metric]["value"]
            if value is not None:
                row[f"{prefix}/{group}/{metric}"] = value
    return row


def score_file(
    config: Config, judge: JudgeThread, source: pathlib.Path, workdir: pathlib.Path
) -> tuple[Evaluation, pathlib.Path]:
    """Judges rows without a category in a copy of the file, then scores it."""
    read_predictions(source)  # a bad line is reported before anything is written
    out_dir = workdir / "eval" / source.stem
    out_dir.mkdir(parents=True, exist_ok=True)
    copy = out_dir / "predictions.jsonl"
    if not (copy.exists() and copy.samefile(source)):
        write_whole(copy, source.read_bytes())
    retry_failed(copy, judge)
    return write_scores(config, out_dir), out_dir


def score_checkpoint(
    config: Config,
    judge: JudgeThread,
    run_dir: RunDir,
    checkpoint: str,
    samples: int,
    recipe_dir: pathlib.Path | None,
) -> tuple[Evaluation, pathlib.Path]:
    """Samples with the weights that ``--checkpoint`` names, judges and scores.

    Args:
        config: recipe; its data and eval sections decide what is sampled.
        judge: labels the answers.
        run_dir: where scores go, and whose checkpoints are meant.
        checkpoint: see `run.restore.open_checkpoint`.
        samples: answers per image; 0 takes ``eval.samples``.
        recipe_dir: folder of the recipe.

    Returns:
        (scores, their folder).

    Raises:
        ValueError: no such checkpoint.
    """
    session, name, weights, step = open_checkpoint(
        config, run_dir.checkpoints, checkpoint, recipe_dir
    )
    count = samples or config.eval.samples
    is_best_of = count > 1 and config.eval.temperature == 0
    exam = Exam.test(config, count) if is_best_of else Exam.test(config)
    exam = dataclasses.replace(exam, samples=count)
    out_dir = run_dir.local / "eval" / (f"{name}_n{count}" if count > 1 else name)
    metrics = evaluate(
        session,
        session.sampling_states(session.parts.trainable),
        judge,
        out_dir,
        exam,
        image_root=run_dir.local,
        console=Console(stderr=True, highlight=False, quiet=not processes.is_first()),
        prompt_step=step,
        weights=weights,
    )
    return metrics, out_dir
