"""What a step costs: FLOPs, memory traffic, collectives, and the time that follows from a chip.

Seconds are a roofline: the larger of FLOPs over peak and bytes over bandwidth, plus collectives,
which XLA hides only in part. Real kernels reach a share of it; nothing here is measured. Lengths
are those of a typical step (`shapes.expected_lengths`), prompts are all of the padded length, and
groups are taken as packed without padding. Decoding is priced call by call (`plan.decode_cost`).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config
from speciarl_jax.plan.chips import Chip
from speciarl_jax.plan.decode_cost import Call, Cost, Counted, Decoding, deal, price, schedule
from speciarl_jax.plan.shapes import StepShapes, expected_lengths, rollout_shape
from speciarl_jax.policy import flops
from speciarl_jax.rollout.memory import kv_token_bytes, rows_that_fit


@dataclasses.dataclass(frozen=True)
class Work:
    """One program over a whole step.

    Attributes:
        model_flops: that the algorithm needs, all devices together.
        hardware_flops: with what rematerialisation computes again.
        device_bytes: read and written in the memory of one device.
        wire_bytes: that one device sends to others.
        seconds: roofline.
    """

    model_flops: float
    hardware_flops: float
    device_bytes: float
    wire_bytes: float
    seconds: float

    def mfu_bound(self, chip: Chip, num_devices: int) -> float:
        """Share of the peak that model FLOPs can reach at most."""
        return self.model_flops / (self.seconds * chip.peak * num_devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the model lies on the devices.

    Attributes:
        data, fsdp, tensor: axis sizes.
        text_bytes: of the language model on one device, adapter included.
        vision_bytes: of the vision tower on one device.
        adapter_bytes: of what is trained, float32, on one device.
        adapter_params: scalars of the adapter.
    """

    data: int
    fsdp: int
    tensor: int
    text_bytes: int
    vision_bytes: int
    adapter_bytes: int
    adapter_params: int

    @property
    def num_devices(self) -> int:
        """Of the job."""
        return self.data * self.fsdp * self.tensor

    @property
    def num_replicas(self) -> int:
        """Places over which prompts are spread."""
        return self.data * self.fsdp


def step_work(
    config: Config,
    arch: Arch,
    shapes: StepShapes,
    layout: Layout,
    chip: Chip,
    cost: Cost | None = None,
) -> dict[str, Work]:
    """Work of each program of a step at the largest shapes, by the names of `plan.programs`.

    `cost` is that of a decode step; None counts what must move.
    """
    counts = _counts(arch, shapes)
    sampling = dataclasses.replace(shapes, num_prompts=shapes.sampled_prompts)
    sampled_counts = _counts(arch, sampling)
    training = flops.Training.of(config, layout.adapter_params)
    sampled = flops.sampling_flops(arch, sampled_counts, layout.adapter_params)
    learned = flops.learning_flops(arch, counts, training)
    traffic = _Traffic(config, arch, shapes, layout)

    def make(model: float, hardware: float, memory: float, wire: float) -> Work:
        compute = hardware / (layout.num_devices * chip.peak)
        seconds = max(compute, memory / chip.bytes_per_s) + wire / chip.wire_bytes_per_s
        return Work(model, hardware, memory, wire, seconds)

    tree = counts.prompt_tokens + counts.completion_tokens
    micro = shapes.num_micro * shapes.num_updates
    passes = {"old log-probs": learned["old"], "reference log-probs": learned["reference"]}
    update = learned["forward"] + learned["backward"]
    hardware = flops.update_hardware_flops(arch, counts, training)
    backwards = 3 if config.model.remat == "full" else 2  # forward, backward, recomputation
    decoding = decode_steps(config, arch, sampling, layout, chip, cost)
    found = {
        "encode": make(sampled["encode"], sampled["encode"], traffic.encode(), 0),
        "prefill": make(
            sampled["prefill"],
            sampled["prefill"],
            shapes.num_waves * layout.text_bytes,
            traffic.wire(sampled_counts.prompt_tokens, 1, shapes.num_waves),
        ),
        "decode": Work(
            sampled["decode"],
            sampled["decode"],
            decoding.device_bytes,
            decoding.wire_bytes,
            decoding.seconds,
        ),
        "update": make(
            update,
            hardware,
            backwards * micro * layout.text_bytes,
            traffic.wire(tree, backwards, micro * backwards)
            + shapes.num_updates * _ring(layout.data, layout.adapter_bytes),
        ),
    }
    for name, model in passes.items():
        if model:
            memory, wire = micro * layout.text_bytes, traffic.wire(tree, 1, micro)
            found[name] = make(model, model, memory, wire)
    return found


def _counts(arch: Arch, shapes: StepShapes) -> flops.Counts:
    patches = np.full((shapes.num_prompts, shapes.windows), arch.vision.window_patches)
    prompts = np.full(shapes.num_prompts, shapes.prompt_tokens)
    return flops.count_tokens(prompts, expected_lengths(shapes), patches)


def _ring(size: int, num_bytes: float) -> float:
    """Bytes that a device sends when `size` devices sum an array of `num_bytes`."""
    return 2 * (size - 1) / size * num_bytes


@dataclasses.dataclass(frozen=True)
class _Traffic:
    """Bytes that move in the memory of a device and between devices."""

    config: Config
    arch: Arch
    shapes: StepShapes
    layout: Layout

    def encode(self) -> float:
        """Weights once, float32 patches once."""
        vision, shapes = self.arch.vision, self.shapes
        images = shapes.sampled_prompts / self.layout.num_devices
        values = images * shapes.windows * vision.window_patches * vision.patch_dim
        return self.layout.vision_bytes + 4 * values

    def wire(self, tokens: int, passes: int, gathers: int) -> float:
        """Two sums of all `tokens` over `tensor` a layer and pass; weights gathered over `fsdp`."""
        text, layout = self.arch.text, self.layout
        states = tokens / layout.num_replicas * text.hidden_size * self.config.model.compute_bytes
        sums = _ring(layout.tensor, states) * 2 * text.num_layers * passes
        return sums + gathers * (layout.fsdp - 1) * layout.text_bytes


def decode_steps(
    config: Config,
    arch: Arch,
    shapes: StepShapes,
    layout: Layout,
    chip: Chip,
    cost: Cost | None = None,
) -> Decoding:
    """All calls of the decode program in a step; `cost` as of `step_work`."""
    text, lengths = arch.text, expected_lengths(shapes)
    token_bytes = kv_token_bytes(text, rollout_shape(config, shapes, layout.tensor))
    if cost is None:
        prompts = shapes.wave_shard_prompts * shapes.prompt_tokens
        traffic = _Traffic(config, arch, shapes, layout)
        logits = text.vocab_size * 4 * (layout.tensor - 1) / layout.tensor**2
        cost = Counted(
            fixed=layout.text_bytes + token_bytes * prompts,
            token=token_bytes,
            fixed_wire=traffic.wire(0, 1, 1),
            row_wire=traffic.wire(layout.num_replicas, 1, 0) + logits,
        )
    linear = flops.linear_flops(text, 1, layout.adapter_params) + flops.head_flops(text, 1)
    calls = decode_calls(config, arch, shapes, layout.tensor, lengths)
    return price(calls, cost, token_bytes, linear / layout.tensor, chip)


def decode_calls(
    config: Config, arch: Arch, shapes: StepShapes, tensor: int, lengths: Int[np.ndarray, "P G"]
) -> list[Call]:
    """The calls of the decode program in a step, for answers of these lengths."""
    fit = functools.partial(rows_that_fit, arch.text, rollout_shape(config, shapes, tensor))
    width = shapes.wave_shard_prompts * shapes.group_size
    waves, few = deal(lengths, shapes.num_replicas, width), shapes.has_few_sizes
    return [call for wave in waves for call in schedule(wave, config.rollout, fit, few)]
