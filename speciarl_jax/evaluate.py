"""ENTRY: samples, judges and scores a policy; also scores predictions that exist already."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

from speciarl_jax import reward, scoring
from speciarl_jax.config import Config
from speciarl_jax.data.recipe import make_loader, open_eval_source
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.predictions import (
    Prediction,
    append_predictions,
    cut_half_line,
    from_rollout,
    read_predictions,
)
from speciarl_jax.report.thumbnails import save_thumbnail
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.groups import await_verdicts, collect_groups
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import Session
from speciarl_jax.types import PromptBatch, Rollout, Verdict

_EVAL_STEP = 2**30  # folded into the seed: evaluation never shares randomness with training


def evaluate(
    session: Session,
    states: tuple[nnx.State, ...],
    judge: JudgeThread,
    out_dir: pathlib.Path,
    *,
    samples: int,
    sampling: Sampling,
    image_root: pathlib.Path,
    prompt_step: int = 0,
) -> dict[str, Any]:
    """Samples answers on every evaluation source, has them judged, scores them.

    Batches are appended to ``predictions.jsonl`` as they are judged; a second call goes on where
    the first stopped, retries rows that the judge failed on, and drops none.

    Args:
        session: model, tokenizer, prompts.
        states: (trainable, frozen) to evaluate.
        judge: labels the answers.
        out_dir: gets ``predictions.jsonl`` and ``metrics.json``.
        samples: answers per image.
        sampling: how they are drawn; temperature 0 is greedy.
        image_root: run directory; thumbnails for the report go there.
        prompt_step: training step, for the judge's log.

    Returns:
        The contents of ``metrics.json``.
    """
    config = session.config
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "predictions.jsonl"
    done: set[tuple[str, str]] = set()
    if path.is_file():
        cut_half_line(path)
        retry_failed(path, judge)
        done = complete_images(read_predictions(path), samples)
    rollout_config = dataclasses.replace(
        config.rollout, max_completion_tokens=config.eval.max_completion_tokens
    )
    engine = RolloutEngine(session.parts.graphdef, rollout_config, session.vocabulary)
    for name in config.data.eval_sources:
        source = open_eval_source(config.data, name)
        loader = make_loader(
            config.data,
            source,
            session.builder,
            min(config.eval.prompts_per_batch, len(source)),
            seed=config.seed,
            shuffle=False,
            num_epochs=1,
        )
        for batch in loader:
            if all(key in done for key in _image_keys(batch)):
                continue
            groups = _sample(session, engine, states, judge, batch, samples, sampling, prompt_step)
            append_predictions(path, _rows(batch, groups, image_root, done))
        loader.close()
    return write_scores(config, path, out_dir)


def _image_keys(batch: PromptBatch) -> list[tuple[str, str]]:
    pairs = zip(batch.datasets, batch.prompt_ids, batch.is_real, strict=True)
    return [(dataset, prompt_id) for dataset, prompt_id, is_real in pairs if is_real]


def _sample(
    session: Session,
    engine: RolloutEngine,
    states: tuple[nnx.State, ...],
    judge: JudgeThread,
    batch: PromptBatch,
    samples: int,
    sampling: Sampling,
    prompt_step: int,
) -> list[list[Rollout]]:
    embeds = session.encode(states, batch)
    finished = engine.generate(
        states,
        batch,
        embeds,
        group_size=samples,
        sampling=sampling,
        seed=session.config.seed,
        step=_EVAL_STEP,
    )
    groups, pending = collect_groups(
        finished,
        batch,
        samples,
        session.vocabulary,
        judge,
        step=prompt_step,
        policy_version=prompt_step,
    )
    await_verdicts(pending)
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


def complete_images(rows: Sequence[Prediction], samples: int) -> set[tuple[str, str]]:
    """(dataset, prompt id) of images that have all their answers.

    Raises:
        ValueError: an image has more or other answers than this evaluation draws.
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row.dataset, row.prompt_id)
        counts[key] = counts.get(key, 0) + 1
    for (dataset, prompt_id), count in counts.items():
        if count != samples:
            raise ValueError(
                f"predictions.jsonl: {dataset} {prompt_id} has {count} answers, this evaluation "
                f"draws {samples}; use another --workdir or delete the file"
            )
    return set(counts)


def retry_failed(path: pathlib.Path, judge: JudgeThread) -> int:
    """Asks again for rows without a label; new rows replace the old. Returns how many."""
    failed = [row for row in read_predictions(path) if row.is_judge_failure]
    outcomes = judge.label([Pair(row.ground_truth, row.prediction or "") for row in failed])
    labelled = [
        dataclasses.replace(row, category=outcome.category, failure=None)
        for row, outcome in zip(failed, outcomes, strict=True)
        if isinstance(outcome, Verdict)
    ]
    if labelled:
        append_predictions(path, labelled)
    return len(failed)


def write_scores(config: Config, path: pathlib.Path, out_dir: pathlib.Path) -> dict[str, Any]:
    """Scores a predictions file and writes ``metrics.json`` beside it."""
    metrics = scoring.metrics_json(
        read_predictions(path),
        in_domain=config.data.in_domain,
        format_failures=config.eval.format_failures,
        bootstrap_samples=config.eval.bootstrap_samples,
        seed=config.seed,
    )
    temporary = out_dir / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(out_dir / "metrics.json")
    return metrics
