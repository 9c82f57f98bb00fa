"""Compiles every program that a run's rollouts can need, before the first step.

Each program is called once on a batch of empty prompts with the shapes of the run, and the decode
loop is asked for no steps, so next to nothing is computed and the programs are in the very cache
that the run looks into. For each prompt length:

    full rows, first columns --shrink--> next rows --shrink--> ... --> fewest rows
        |  widen                     |  widen                             |  widen
    full rows, next columns  --shrink--> ...                       every arrow and every corner
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array

from speciarl_jax.arch import VisionArch
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.images import VisionArrays
from speciarl_jax.devices.layout import Params
from speciarl_jax.rollout import decode, layout
from speciarl_jax.rollout.engine import RolloutEngine, Wave
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.timing import num_compiled


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes that prompts of a run come in.

    Attributes:
        num_prompts: P of this process.
        prompt_lengths: padded, tokens.
        num_windows: padded windows of an image.
    """

    num_prompts: int
    group_size: int
    prompt_lengths: Sequence[int]
    num_windows: Sequence[int]
    images_per_prompt: int = 1


def warm_up(
    engine: RolloutEngine,
    states: tuple[Params, ...],
    encode: Callable[[tuple[Params, ...], PromptBatch], Array],
    vision: VisionArch,
    shapes: BatchShapes,
    *,
    sampling: Sampling,
    seed: int,
) -> int:
    """Runs every program once on empty prompts; returns how many had to be compiled.

    Args:
        engine, states, sampling, seed: those of the run; the seed is part of a program.
        encode: images to embeddings, as before `RolloutEngine.generate`.
        vision: sizes of the empty images.
        shapes: of the run's batches.

    Raises:
        ValueError: a batch does not fit ``rollout.max_cache_mb``.
    """
    compiled, mesh = num_compiled(), engine.placement.mesh
    by_size = mesh is None or mesh.size == 1  # as `Session.encode`
    for windows in shapes.num_windows:
        for small in [s for s in shapes.num_windows if s == windows or (by_size and s < windows)]:
            batch = empty_batch(shapes, shapes.prompt_lengths[0], windows, vision)
            embeds = encode(states, with_sizes(batch, small, vision))
        for length in shapes.prompt_lengths:
            batch = empty_batch(shapes, length, windows, vision)
            table_rows = len(embeds) * engine.own_shards // engine.placement.num_shards
            waves = engine.plan_waves(states, batch, table_rows, shapes.group_size, sampling)
            wave = engine.start(states, waves[0], embeds, shapes.group_size, seed, 0)
            if windows == shapes.num_windows[0]:  # decoding does not see the images
                _run_sizes(engine, states, wave, shapes.group_size, sampling)
    return num_compiled() - compiled


def empty_batch(
    shapes: BatchShapes, length: int, num_windows: int, vision: VisionArch
) -> PromptBatch:
    """Prompts of one pad token each, in padded shapes."""
    num_prompts, num_images = shapes.num_prompts, shapes.num_prompts * shapes.images_per_prompt
    nothing = [""] * num_prompts
    return PromptBatch(
        prompt_ids=nothing,
        ground_truths=nothing,
        datasets=nothing,
        images=[b""] * num_prompts,
        tokens=np.zeros((num_prompts, length), np.int32),
        prompt_lengths=np.ones(num_prompts, np.int32),
        positions=np.zeros((num_prompts, 3, length), np.int32),
        position_deltas=np.zeros(num_prompts, np.int32),
        image_rows=np.full((num_prompts, length), -1, np.int32),
        vision=VisionArrays.empty(num_images, num_windows, vision),
        global_index=np.arange(num_prompts, dtype=np.int64),
        is_real=np.ones(num_prompts, bool),
    )


def with_sizes(batch: PromptBatch, small: int, vision: VisionArch) -> PromptBatch:
    """A batch whose smaller images have `small` windows and the others all there is room for."""
    mask = np.ones_like(batch.vision.mask)
    mask[: -(-len(mask) // 2), small * vision.window_patches :] = False
    return dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, mask=mask))


def _run_sizes(
    engine: RolloutEngine,
    states: tuple[Params, ...],
    wave: Wave,
    slots: int,
    sampling: Sampling,
) -> None:
    """Every corner and arrow of the module's drawing for one prompt length."""
    num_prompts, full = wave.prompts.num_prompts, wave.rows.per_shard
    sizes = layout.row_sizes(full, engine.has_few_sizes) if engine.config.compact else [full]
    for place, columns in enumerate(engine.columns):
        wider = engine.columns[place + 1] if columns != engine.columns[-1] else 0
        corner, largest = dataclasses.replace(wave), wave.rows.per_shard
        for size in [size for size in sizes if size <= largest]:
            if size != largest:
                engine.shrink(corner, size)
            row_map = engine.row_map(corner.rows, num_prompts, slots)
            engine.advance(states, corner, row_map, 0, 0, sampling)
            if size == largest:
                wave.state = corner.state  # decoding has consumed the one before
            elif wider and size <= engine.rows_that_fit(wider):
                decode.widen(corner.state, wider, engine.placement)
        del corner
        if wider:
            for size in [s for s in sizes if engine.rows_that_fit(wider) <= s < largest]:
                engine.shrink(wave, size)
            wave.state = decode.widen(wave.state, wider, engine.placement)
