"""`speciarl sample`: a person tries a policy on one image."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.markup import escape

from speciarl_jax.config import Config, MeshConfig
from speciarl_jax.data.collate import collate
from speciarl_jax.judge.parse import extract_answer
from speciarl_jax.metrics import make_console
from speciarl_jax.rollout.engine import FinishedRow, Vocabulary
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import enable_compile_cache, open_session

_CHUNK_TOKENS = 16  # answers appear after at most this many more tokens


def run(
    model: str,
    image: pathlib.Path,
    *,
    prompt: str,
    num_answers: int,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> int:
    """Samples answers and prints each as it finishes; returns the exit code.

    Raises:
        ValueError: no such model or image, or an unreadable one.
    """
    if not image.is_file():
        raise ValueError(f"--image={image}: no such file")
    config = Config(seed=seed)
    config.model.path = model
    config.lora.rank = 0
    config.data.prompt = prompt or ("field_guide" if model == "tiny" else "specific")
    config.rollout.max_completion_tokens = max_tokens
    config.rollout.chunk_tokens = _CHUNK_TOKENS
    config.rollout.compact = False  # one program to compile; a person waits for it
    config.mesh = MeshConfig(1, 1, 1)
    enable_compile_cache(config.compile_cache_dir)
    session = open_session(config)
    encoded = session.builder.encode_images([image.read_bytes()], name=str(image))
    batch = collate([encoded], session.arch, session.builder.limits, pad_id=0)
    batch = dataclasses.replace(batch, global_index=np.zeros(1, np.int64))
    states = session.local_states(session.parts.trainable)
    console = make_console()
    with console.status(f"sampling {num_answers} answers"):
        finished = session.engine.generate(
            states,
            batch,
            session.encode(states, batch),
            group_size=num_answers,
            sampling=Sampling(temperature),
            seed=seed,
            step=0,
        )
        print_answers(console, finished, session.vocabulary)
    return 0


def print_answers(
    console: Console, finished: Iterable[list[FinishedRow]], vocabulary: Vocabulary
) -> None:
    """Prints each answer the moment it is finished: its label, log-prob and whole text."""
    for rows in finished:
        for row in rows:
            text = vocabulary.decode(row.tokens.tolist())
            label = escape(extract_answer(text) or "(no answer)")
            cut = "  cut off by --max_tokens" if row.is_truncated else ""
            logprob = f"[dim]logprob {row.logprobs.sum():.2f}{cut}[/dim]"
            console.print(f"[bold]{row.sample + 1}[/bold]  {label}  {logprob}")
            console.print(escape(text), style="dim")
