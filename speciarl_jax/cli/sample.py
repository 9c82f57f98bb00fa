"""`speciarl sample`: a person tries a policy on one image."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape

from speciarl_jax.cli.flags import Verbs
from speciarl_jax.config.schema import Config, MeshConfig
from speciarl_jax.judge.parse import extract_answer
from speciarl_jax.rollout.finished import FinishedRow
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.run.session import enable_compile_cache, open_session

_CHUNK_TOKENS = 16  # answers appear after at most this many more tokens


def register(verbs: Verbs) -> None:
    """Adds the verb `sample`."""
    sample = verbs.add_parser("sample", help="try a policy by hand on one image")
    sample.add_argument("--model", default="tiny", help="HF directory or hub id")
    sample.add_argument("--image", required=True, type=pathlib.Path, help="image file")
    sample.add_argument("--prompt", default="", help="prompt name or file; default: by model")
    sample.add_argument("--n", type=int, default=1, help="answers")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    sample.add_argument("--max_tokens", type=int, default=512, help="completion limit, tokens")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Samples answers and prints each as it finishes.

    Raises:
        ValueError: no such model or image, or an unreadable one.
    """
    import numpy as np

    from speciarl_jax.data.collate import collate
    from speciarl_jax.monitor.tables import make_console

    if not args.image.is_file():
        raise ValueError(f"--image={args.image}: no such file")
    config = Config(seed=args.seed)
    config.model.path = args.model
    config.lora.rank = 0
    config.data.prompt = args.prompt or ("field_guide" if args.model == "tiny" else "specific")
    config.rollout.max_completion_tokens = args.max_tokens
    config.rollout.chunk_tokens = _CHUNK_TOKENS
    config.rollout.compact = False  # one program to compile; a person waits for it
    config.mesh = MeshConfig(1, 1, 1)
    enable_compile_cache(config.compile_cache_dir)
    session = open_session(config)
    encoded = session.builder.encode_images([args.image.read_bytes()], name=str(args.image))
    batch = collate([encoded], session.arch, session.builder.limits, pad_id=0)
    batch = dataclasses.replace(batch, global_index=np.zeros(1, np.int64))
    states = session.sampling_states(session.parts.trainable)
    console = make_console()
    with console.status(f"sampling {args.n} answers"):
        finished = session.engine.generate(
            states,
            batch,
            session.encode(states, batch),
            group_size=args.n,
            sampling=Sampling(args.temperature),
            seed=args.seed,
            step=0,
        )
        print_answers(console, finished, session.vocabulary.decode)
    return 0


def print_answers(
    console: Console,
    finished: Iterable[list[FinishedRow]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Prints each answer the moment it is finished: its label, log-prob and whole text."""
    for rows in finished:
        for row in rows:
            text = decode(row.completion_tokens.tolist())
            label = escape(extract_answer(text) or "(no answer)")
            cut = "  cut off by --max_tokens" if row.is_truncated else ""
            logprob = f"[dim]logprob {row.logprobs.sum():.2f}{cut}[/dim]"
            console.print(f"[bold]{row.sample + 1}[/bold]  {label}  {logprob}")
            console.print(escape(text), style="dim")
