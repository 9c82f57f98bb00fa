"""A small random policy directory and prompts, made once per test session."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import numpy as np
from flax import nnx

from speciarl_jax.config.schema import Config
from speciarl_jax.convert.tiny import make_tiny_dir
from speciarl_jax.data.collate import collate
from speciarl_jax.data.field_guide.specimens import draw_specimens, encode_png
from speciarl_jax.run.session import Session, open_session

MERGE_UNIT = 4  # patches per merged token
QUESTIONS = ["What is it? Think, then answer.", "What is it exactly? Think, then answer."]


@functools.cache
def tiny_dir() -> str:
    """Random weights, scaled so that attention is far from uniform and norms are not one."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="speciarl-tiny-"))
    make_tiny_dir(path, QUESTIONS)
    return str(path)


def small_config(**changes) -> Config:
    config = Config(name="test")
    config.model.path = tiny_dir()
    config.lora.rank = 4
    config.lora.alpha = 8.0
    config.data.source = "field_guide_birds:train=24,validation=8,test=8"
    config.data.eval_sources = ("field_guide_birds:train=24,validation=8,test=8",)
    config.data.prompt = "field_guide"
    config.data.prompt_buckets = (48,)
    config.data.window_buckets = (6,)
    config.rollout.group_size = 4
    config.rollout.max_completion_tokens = 16
    config.rollout.chunk_tokens = 4
    config.rollout.compact = False
    config.train.num_steps = 2
    config.train.prompts_per_step = 4
    config.train.prompts_per_update = 4
    config.train.prompts_per_micro_batch = 2
    config.train.save_every = 1
    config.train.table_every = 1
    config.optim.learning_rate = 1e-3
    config.eval.max_completion_tokens = 16
    config.eval.bootstrap_samples = 50
    config.mesh.data = 1
    config.compile_cache_dir = ""
    for name, value in changes.items():
        section, _, field = name.partition("__")
        target = getattr(config, section)
        setattr(target, field, value)
    return config


def open_small_session(**changes) -> Session:
    return open_session(small_config(**changes))


def jolt(session: Session, seed: int = 0, scale: float = 0.3) -> Session:
    """Perturbs every adapter weight, so that B is not zero and policy and reference differ."""
    leaves, treedef = jax.tree.flatten(session.parts.trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    trainable = jax.tree.unflatten(treedef, moved)
    return dataclasses.replace(
        session, parts=dataclasses.replace(session.parts, trainable=trainable)
    )


def states(session: Session) -> tuple[nnx.State, nnx.State]:
    return session.parts.trainable, session.parts.frozen


def small_batch(session: Session, num_prompts: int, rows: int = 0):
    specimens = draw_specimens("bird", "test", 24)[:num_prompts]
    encoded = [
        session.builder.encode_images([encode_png(s)], name=f"bird/{i}")
        for i, s in enumerate(specimens)
    ]
    return collate(
        encoded,
        session.arch,
        session.builder.limits,
        pad_id=0,
        num_prompts=rows or num_prompts,
        prompt_buckets=(48,),
        window_buckets=(6,),
    )


def plain_sequence(batch, prompt: int, completion: np.ndarray, size: int = 72):
    """One prompt + completion without sharing: (tokens, positions, length, image rows), padded."""
    length = int(batch.prompt_lengths[prompt])
    total = length + len(completion)
    tokens = np.zeros(size, np.int32)
    tokens[:total] = np.concatenate([batch.tokens[prompt, :length], completion])
    positions = np.zeros((3, size), np.int32)
    positions[:, :length] = batch.positions[prompt, :, :length]
    start = length + int(batch.position_deltas[prompt])
    positions[:, length:total] = start + np.arange(len(completion))
    rows = np.full(size, -1, np.int32)
    table_rows = batch.vision.mask.size // MERGE_UNIT
    rows[:length] = batch.table_rows(table_rows)[prompt, :length]
    return tokens, positions, np.int32(total), rows


@functools.partial(jax.jit, static_argnames="graphdef")
def _plain_logits(graphdef, states, tokens, positions, lengths, rows, embeds):
    policy = nnx.merge(graphdef, *states)
    return policy.text.logits(policy.hidden_states(tokens, positions, lengths, rows, embeds))


def full_logits(session: Session, batch, prompt: int, completion: np.ndarray) -> np.ndarray:
    """Logits at every position of one plain prompt + completion sequence: no cache, no sharing."""
    sequence = [np.asarray(x)[None] for x in plain_sequence(batch, prompt, completion)]
    embeds = session.encode(states(session), batch)
    logits = _plain_logits(session.parts.graphdef, states(session), *sequence, embeds)
    return np.array(logits)[0, : int(sequence[2][0])]
