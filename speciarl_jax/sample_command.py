"""`speciarl sample`: a person tries a policy on one image."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from rich.console import Console
from rich.markup import escape

from speciarl_jax.config import Config
from speciarl_jax.data.collate import collate
from speciarl_jax.judge.parse import extract_answer
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.session import open_session


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
    session = open_session(config)
    encoded = session.builder.encode_images([image.read_bytes()], name=str(image))
    batch = collate([encoded], session.arch, session.builder.limits, pad_id=0)
    batch = dataclasses.replace(batch, global_index=np.zeros(1, np.int64))
    states = (session.parts.trainable, session.parts.frozen)
    engine = RolloutEngine(session.parts.graphdef, config.rollout, session.vocabulary)
    console = Console(highlight=False)
    for rows in engine.generate(
        states,
        batch,
        session.encode(states, batch),
        group_size=num_answers,
        sampling=Sampling(temperature),
        seed=seed,
        step=0,
    ):
        for row in rows:
            text = session.vocabulary.decode(row.tokens.tolist())
            answer = extract_answer(text)
            title = f"[bold]{row.sample + 1}[/bold]  {escape(answer or '(no answer)')}"
            console.print(f"{title}  [dim]logprob {row.logprobs.sum():.2f}[/dim]")
            console.print(escape(text), style="dim")
    return 0
