"""Sizes of one step: what every program of a recipe is compiled for."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
from jaxtyping import Int

from speciarl_jax.arch import Arch, VisionArch
from speciarl_jax.config.schema import Config, micro_batch_prompts
from speciarl_jax.data.collate import prompt_bucket, window_bucket
from speciarl_jax.data.images import num_windows
from speciarl_jax.rollout import layout, memory
from speciarl_jax.rollout.sampling import training_sampling

_MAX_ASPECT = 2.0  # of photographs; a longer image of the same area needs more windows


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """One step on a mesh.

    Attributes:
        num_prompts: P of the whole step.
        sampled_prompts: sampled at a time; more than P with dynamic sampling.
        group_size: G.
        prompt_tokens: S, padded.
        windows: per image, padded.
        completion_tokens: limit C.
        num_hosts, num_replicas: processes that sample by themselves (one if the job samples as
            one), and places over which prompts are spread.
        wave_prompts: prompts that such a process samples at once.
        micro_prompts: prompts of one micro-batch, all replicas together.
        num_micro: micro-batches in one update program.
        num_updates: optimiser updates a step.
        has_few_sizes: of rows and columns in decoding, see `rollout.placement`.
    """

    num_prompts: int
    sampled_prompts: int
    group_size: int
    prompt_tokens: int
    windows: int
    completion_tokens: int
    num_hosts: int
    num_replicas: int
    wave_prompts: int
    micro_prompts: int
    num_micro: int
    num_updates: int
    has_few_sizes: bool = False

    @property
    def host_prompts(self) -> int:
        """Prompts that one process samples."""
        return self.sampled_prompts // self.num_hosts

    @property
    def wave_shard_prompts(self) -> int:
        """Of those, prompts of one replica."""
        return self.wave_prompts * self.num_hosts // self.num_replicas

    @property
    def num_waves(self) -> int:
        """Rollout batches of one process, one after the other."""
        return math.ceil(self.host_prompts / self.wave_prompts)


def plan_shapes(
    config: Config,
    arch: Arch,
    mesh_shape: dict[str, int],
    num_hosts: int,
    has_few_sizes: bool = False,
) -> StepShapes:
    """The largest shapes of a recipe on a mesh of these axis sizes and processes.

    Raises:
        ValueError: a recipe without rollouts, or batch sizes that do not divide over the mesh.
    """
    train = config.train
    if config.algo.name == "sft":
        raise ValueError("algo.name=sft: `plan` knows recipes with rollouts only")
    replicas = mesh_shape["data"] * mesh_shape["fsdp"]
    micro, num_micro = _micro_batches(config, replicas)
    sampled = config.generation_prompts
    if train.prompts_per_step % replicas or sampled % replicas or replicas % num_hosts:
        raise ValueError(
            f"train.prompts_per_step={train.prompts_per_step}, {sampled} sampled at a time: not a "
            f"multiple of {replicas} replicas on {num_hosts} hosts; change it or the mesh"
        )
    tokens = prompt_bucket(_longest_prompt(config), config.data.prompt_buckets)
    shapes = StepShapes(
        num_prompts=train.prompts_per_step,
        sampled_prompts=sampled,
        group_size=config.rollout.group_size,
        prompt_tokens=tokens,
        windows=_most_windows(config, arch.vision, tokens),
        completion_tokens=config.rollout.max_completion_tokens,
        num_hosts=num_hosts,
        num_replicas=replicas,
        wave_prompts=sampled // num_hosts,
        micro_prompts=micro,
        num_micro=num_micro,
        num_updates=config.updates_per_step,
        has_few_sizes=has_few_sizes,
    )
    wave = rollout_shape(config, shapes, mesh_shape["tensor"])
    return dataclasses.replace(shapes, wave_prompts=memory.prompts_per_wave(arch.text, wave))


def _longest_prompt(config: Config) -> int:
    return min([config.data.max_prompt_tokens, *config.data.prompt_buckets[-1:]])


def _micro_batches(config: Config, replicas: int) -> tuple[int, int]:
    """(prompts of a micro-batch, micro-batches of a program); a pack is a program of its own."""
    train, rollout = config.train, config.rollout
    if train.prompts_per_update % replicas:
        raise ValueError(
            f"train.prompts_per_update={train.prompts_per_update} is not a multiple of {replicas} "
            "replicas; change it or the mesh"
        )
    if train.micro_batch_tokens:
        tokens = _longest_prompt(config) + rollout.group_size * rollout.max_completion_tokens
        if train.micro_batch_tokens < tokens:
            raise ValueError(
                f"train.micro_batch_tokens={train.micro_batch_tokens}: one group may take {tokens} "
                "padded tokens; set it to at least that"
            )
        return train.micro_batch_tokens // tokens * replicas, 1
    micro = micro_batch_prompts(train, replicas) * replicas
    return micro, train.prompts_per_update // micro


def _most_windows(config: Config, vision: VisionArch, prompt_tokens: int) -> int:
    """Padded windows of the largest image: by ``data.max_pixels``, and by the prompt it is in."""
    if config.data.window_buckets:
        return config.data.window_buckets[-1]
    side = vision.patch_size_px * vision.spatial_merge_size
    tokens = prompt_tokens
    if config.data.max_pixels:
        tokens = min(tokens, config.data.max_pixels // side**2)
    most, merge = 1, vision.spatial_merge_size
    for rows in range(1, tokens + 1):
        columns = tokens // rows
        if max(rows, columns) <= _MAX_ASPECT * min(rows, columns):
            most = max(most, num_windows((1, rows * merge, columns * merge), vision))
    return window_bucket(most)


def rollout_shape(config: Config, shapes: StepShapes, tensor: int) -> memory.RolloutShape:
    """What `rollout.memory` counts for one process."""
    return memory.RolloutShape(
        config=config.rollout,
        num_prompts=shapes.wave_prompts,
        group_size=shapes.group_size,
        prompt_tokens=shapes.prompt_tokens,
        compute_bytes=config.model.compute_bytes,
        num_shards=shapes.num_replicas // shapes.num_hosts,
        tensor=tensor,
        truncates=training_sampling(config).truncates,
        has_few_sizes=shapes.has_few_sizes,
    )


def all_shapes(config: Config, shapes: StepShapes) -> list[StepShapes]:
    """Every bucket of prompts, and the columns of `rollout.layout.column_sizes`."""
    prompts = config.data.prompt_buckets or (shapes.prompt_tokens,)
    windows = config.data.window_buckets or (shapes.windows,)
    chunk, limit = config.rollout.chunk_tokens, shapes.completion_tokens
    columns = layout.column_sizes(chunk, limit, config.rollout.compact, shapes.has_few_sizes)
    return [
        dataclasses.replace(shapes, prompt_tokens=s, windows=w, completion_tokens=c)
        for s in sorted(prompts, reverse=True)
        for w in sorted(windows, reverse=True)
        for c in sorted(columns, reverse=True)
    ]


def expected_lengths(shapes: StepShapes) -> Int[np.ndarray, "P G"]:
    """Completion lengths of a typical step: quantiles of the log-normal, cut at the limit.

    Their mean is about 190 tokens where the limit does not matter.
    """
    count = shapes.num_prompts * shapes.group_size
    normal = statistics.NormalDist()
    sigma = math.log(memory.P95_TOKENS / memory.MEDIAN_TOKENS) / normal.inv_cdf(0.95)
    quantiles = (np.arange(count) + 0.5) / count
    deviates = np.array([normal.inv_cdf(q) for q in quantiles])
    lengths: np.ndarray = np.ceil(memory.MEDIAN_TOKENS * np.exp(sigma * deviates))
    lengths = np.clip(lengths, 1, shapes.completion_tokens).astype(np.int64)
    # Every group gets short and long ones.
    return lengths.reshape(shapes.group_size, shapes.num_prompts).T
