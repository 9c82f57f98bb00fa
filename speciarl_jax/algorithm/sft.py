"""Supervised fine-tuning: the paper's SFT baseline, and the warm-up of the small policy.

A target (`data.targets`) says what the answer to an example should be.
"""

from __future__ import annotations

import time

import numpy as np
import optax

from speciarl_jax.algorithm.credit import Credit
from speciarl_jax.algorithm.learn import (
    References,
    finish_update,
    make_sequences,
    start_update,
)
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.field_guide.targets import TargetFn
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.devices import processes
from speciarl_jax.devices.layout import own_prompts
from speciarl_jax.learner.batches import Completions, bucket_tokens
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.types import Metrics


def supervised_completions(
    session: Session, loader: PromptLoader, batch: PromptBatch, target: TargetFn
) -> Completions:
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
    (longest,) = processes.largest(int(lengths.max()))
    padded = np.zeros((len(rows), 1, bucket_tokens(longest, limit)), np.int32)
    for p, row in enumerate(rows):
        padded[p, 0, : len(row)] = row
    return Completions(padded, lengths, np.zeros(padded.shape, np.float32))


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
    completions = supervised_completions(session, loader, batch, target)
    valid, zeros = np.ones(completions.lengths.shape, bool), np.zeros(completions.lengths.shape)
    credit = Credit(np.zeros_like(completions.lengths), zeros, valid, zeros)
    embeds = None
    if not session.config.model.train_vision:
        batch = session.pad_alike(batch)
        embeds = own_prompts(session.encode(session.sampling_states(state.trainable), batch))
    sequences = make_sequences(session, *session.agree_shapes(batch, embeds), completions)
    update = start_update(session, optimizer, state, sequences, credit, References())
    state, metrics = finish_update(session.config, state, update)
    seconds = time.perf_counter() - start
    metrics |= {
        "time/step_s": seconds,
        "throughput/tokens_per_s": float(processes.gather(completions.lengths).sum()) / seconds,
    }
    return state, {"step": state.step, **metrics}
