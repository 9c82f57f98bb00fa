"""What a run opens before its first step, and what it refuses."""

from __future__ import annotations

import dataclasses
import time

import jax
from rich.console import Console

from speciarl_jax.config.schema import Config
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.recipe import open_train_source
from speciarl_jax.devices import processes
from speciarl_jax.rollout.sampling import training_sampling
from speciarl_jax.rollout.warm_up import BatchShapes, warm_up
from speciarl_jax.run.checkpoint import Checkpoints
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.run.storage import RunDir


def open_checkpoints(config: Config, run_dir: RunDir) -> Checkpoints:
    """The run's checkpoints, kept as the recipe says."""
    train = config.train
    return Checkpoints(run_dir.checkpoints, train.keep_checkpoints, keep_best=train.keep_best)


def check_processes(config: Config) -> None:
    """Refuses what one process can do and this number of them cannot.

    Raises:
        ValueError: names the setting.
    """
    count, algo = jax.process_count(), config.algo
    for name, prompts in {
        "train.prompts_per_update": config.train.prompts_per_update,
        "algo.generation_prompts": algo.generation_prompts,
    }.items():
        if prompts % count:
            raise ValueError(f"{name}={prompts}: expected a multiple of the {count} processes")


def check_scope(session: Session) -> None:
    """Refuses what processes can do that sample together and those that do it by themselves cannot.

    Raises:
        ValueError: names the settings.
    """
    config, count = session.config, jax.process_count()
    is_host = count > 1 and not session.engine.is_job
    if is_host and config.algo.dynamic_sampling and config.train.async_steps:
        # Its agreement on each batch would meet the updates, which start when labels come.
        raise ValueError(
            f"algo.dynamic_sampling=true with train.async_steps={config.train.async_steps}: "
            f"{count} processes must sample together for that; set rollout.scope=job"
        )


def open_train_loader(session: Session) -> PromptLoader:
    """Training prompts in the run's global order."""
    config = session.config
    is_whole = jax.process_count() == 1 or config.algo.dynamic_sampling
    num_blocks = 1 if is_whole else config.updates_per_step  # each process has its part of each
    return PromptLoader(
        config.data,
        open_train_source(config.data),
        session.builder,
        config.generation_prompts,
        seed=config.seed,
        pad_id=int(session.vocabulary.stop_ids[0]),
        process_index=processes.share_index(),
        process_count=processes.num_shares(),
        num_blocks=num_blocks,
    )


def initial_like(state: TrainState, session: Session) -> TrainState:
    """The untrained policy, whatever step `state` is at."""
    return dataclasses.replace(state, trainable=session.parts.trainable, step=0)


def warm_up_rollouts(console: Console, session: Session, state: TrainState) -> None:
    """Compiles every program that sampling can need; a step then waits for none."""
    config, start = session.config, time.perf_counter()
    shapes = BatchShapes(
        num_prompts=config.generation_prompts // processes.num_shares(),
        group_size=config.rollout.group_size,
        prompt_lengths=config.data.prompt_buckets,
        num_windows=config.data.window_buckets,
    )
    count = warm_up(
        session.engine,
        session.sampling_states(state.trainable),
        session.encode,
        session.arch.vision,
        shapes,
        sampling=training_sampling(config),
        seed=config.seed,
    )
    console.print(f"warm-up: {count} programs in {time.perf_counter() - start:.1f}s")
