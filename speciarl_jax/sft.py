"""Supervised fine-tuning: the paper's SFT baseline, and the warm-up of the small policy.

A target says what the answer to an example should be. Three are built in; a dotted path names a
user's own ``function(example_key, ground_truth, question, rng) -> completion text``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np
import optax

from speciarl_jax import hosts
from speciarl_jax.batching import GroupArrays, bucket_tokens
from speciarl_jax.checkpoint import TrainState
from speciarl_jax.data.field_guide.answers import answer_text, sample_level
from speciarl_jax.data.field_guide.specimens import Specimen, draw_specimens
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.selection import parse_mixture
from speciarl_jax.gather import agree_shapes
from speciarl_jax.learn import Metrics, finish_update, start_updates, update_batch
from speciarl_jax.reward import import_function
from speciarl_jax.scores import Scores
from speciarl_jax.session import Session
from speciarl_jax.types import PromptBatch

TargetFn = Callable[[str, str, str, np.random.Generator], str]

# Shares of answer levels in the warm-up, by question. The plain question is answered cautiously,
# so that the policy knows more than it says; asked for the exact name, it says what it knows.
_PLAIN_SHARES = {"generic": 0.60, "genus": 0.25, "species": 0.15}
_EXACT_SHARES = {"generic": 0.0, "genus": 0.0, "species": 1.0}


def answer_only(key: str, ground_truth: str, question: str, rng: np.random.Generator) -> str:
    """``<answer>label</answer>``: the SFT baseline without reasoning."""
    return f"<answer>{ground_truth}</answer>"


def field_guide_target(source: str) -> TargetFn:
    """The warm-up's target: visible parts, a level word, an answer at that level.

    Args:
        source: the recipe's ``data.source``; its options say how the specimens were drawn.
    """

    def target(key: str, ground_truth: str, question: str, rng: np.random.Generator) -> str:
        specimen = _specimens(source)[key]
        shares = _EXACT_SHARES if "exact" in question else _PLAIN_SHARES
        return answer_text(specimen, sample_level(specimen, rng, shares))

    return target


@functools.cache
def _specimens(source: str) -> dict[str, Specimen]:
    """Specimen of every prompt id of a mixture of field guide sources, training split."""
    from speciarl_jax.data.builders.field_guide import DOMAINS, FieldGuideConfig
    from speciarl_jax.data.sources import parse_options

    found = {}
    for _, spec in parse_mixture(source):
        name, _, argument = spec.partition(":")
        domain = name.removeprefix("field_guide_")
        options = FieldGuideConfig.make(domain, **parse_options(name, argument))
        specimens = draw_specimens(
            DOMAINS[domain], "train", options.num_train, options.seed, options.hard_frac
        )
        for number, specimen in enumerate(specimens):
            found[f"{name}/train/train-{number:05d}"] = specimen
    return found


def resolve_target(name: str, source: str) -> TargetFn:
    """The target function that a recipe names.

    Raises:
        ValueError: unknown name, or a dotted path that cannot be imported.
    """
    if name == "answer":
        return answer_only
    if name == "field_guide":
        return field_guide_target(source)
    if "." in name:
        return import_function(name, "target")
    raise ValueError(
        f"train.sft_target={name!r}: expected answer, field_guide or a dotted path to a function"
    )


def supervised_arrays(
    session: Session, loader: PromptLoader, batch: PromptBatch, target: TargetFn
) -> GroupArrays:
    """Tokens of one target per prompt, as groups of one, stop token included.

    Raises:
        ValueError: a target longer than ``rollout.max_completion_tokens``.
    """
    config = session.config
    limit = config.rollout.max_completion_tokens
    stop = session.tokenizer.eos_token_id
    rows = []
    for prompt_id, truth, index in zip(
        batch.prompt_ids, batch.ground_truths, batch.global_index, strict=True
    ):
        epoch = loader.plan.locate(int(index))[0]
        question = session.builder.template.pick(session.builder.seed, prompt_id, epoch)
        rng = np.random.default_rng([config.seed, int(index)])
        text = target(prompt_id, truth, question, rng)
        tokens = [*session.tokenizer.encode(text, add_special_tokens=False), stop]
        if len(tokens) > limit:
            raise ValueError(
                f"{prompt_id}: the target has {len(tokens)} tokens, "
                f"rollout.max_completion_tokens allows {limit}"
            )
        rows.append(tokens)
    lengths = np.array([[len(row)] for row in rows], np.int32)
    (longest,) = hosts.largest(int(lengths.max()))
    tokens = np.zeros((len(rows), 1, bucket_tokens(longest, limit)), np.int32)
    for p, row in enumerate(rows):
        tokens[p, 0, : len(row)] = row
    return GroupArrays(tokens, lengths, np.zeros(tokens.shape, np.float32))


def run_sft_step(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loader: PromptLoader,
    batch: PromptBatch,
    target: TargetFn,
) -> tuple[TrainState, Metrics]:
    """One supervised update over a batch; the loss is the mean cross-entropy per token."""
    start = time.perf_counter()
    arrays = supervised_arrays(session, loader, batch, target)
    valid = np.ones(arrays.lengths.shape, bool)
    zeros = np.zeros(arrays.lengths.shape)
    scores = Scores(np.zeros_like(arrays.lengths), zeros, valid, zeros)
    embeds = None
    if not session.config.model.train_vision:
        embeds = session.encode(session.local_states(state.trainable), batch)
    batch, embeds = agree_shapes(session, batch, embeds)
    whole = update_batch(session, batch, arrays, scores, embeds)
    update = start_updates(session, optimizer, state, whole, arrays.lengths)
    state, metrics = finish_update(session.config, state, update)
    seconds = time.perf_counter() - start
    metrics |= {
        "time/step_s": seconds,
        "throughput/tokens_per_s": float(hosts.gather(arrays.lengths).sum()) / seconds,
    }
    return dataclasses.replace(state, step=state.step + 1), {"step": state.step + 1, **metrics}
