"""FLOPs of a training step, counted from the architecture and the real tokens. No jax.

A multiply-add is two FLOPs. Only matrix products count (weights, attention scores, attention
outputs); norms, softmax, rotary angles and the sampler do not. Model FLOPs leave out padding and
recomputation, and count each image once per rollout batch and each prompt once per group, which is
what the algorithm needs; `update_hardware_flops` adds what rematerialisation computes again.

    linear      2 * weights * tokens                     forward
    attention   4 * heads * head_dim * layers * pairs    forward; a pair: a query and a key it sees
    backward    1x forward for the gradient of the inputs, 1x for that of the weights: frozen
                weights need the first only, attention and adapters both

XLA's own cost analysis counts the body of a scan once, so it cannot be used on the real programs;
`tests/policy/test_flops.py` compares with it on two layers written out.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config.schema import Config

# Dense bfloat16 peak of one jax device, FLOP/s, by the start of jax's `device_kind`; the first that
# fits counts. TPU: the system architecture pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e).
# NVIDIA: the products' data sheets, without sparsity, SXM where not named.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself v5 or v5p
    ("TPU v6", 918e12),  # v6e, Trillium
    ("NVIDIA B200", 2250e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a `jax.Device.device_kind`, None if the table does not know it."""
    for start, peak in PEAK_FLOPS:
        if device_kind.startswith(start):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class Counts:
    """Real tokens and query-key pairs of a batch of groups; add counts with ``+``.

    Attributes:
        prompt_tokens: of all prompts, each once.
        completion_tokens: of all answers, stop tokens included.
        prompt_pairs: pairs within prompts: n (n + 1) / 2 each.
        completion_pairs: pairs of answers with their prompt and themselves.
        patches: of all images.
        window_pairs: pairs of patches within attention windows.
        image_pairs: pairs of patches within images, for the blocks with full attention.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_pairs: int = 0
    completion_pairs: int = 0
    patches: int = 0
    window_pairs: int = 0
    image_pairs: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Both batches."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(a + b for a, b in zip(ours, theirs, strict=True)))


def count_tokens(
    prompt_lengths: np.ndarray, lengths: np.ndarray, window_patches: np.ndarray
) -> Counts:
    """Counts of P groups.

    Args:
        prompt_lengths: [P] tokens, image tokens included.
        lengths: [P, G] completion tokens.
        window_patches: [I, W] real patches in each attention window of each image.
    """
    prompt, own = prompt_lengths.astype(np.int64), lengths.astype(np.int64)
    windows = window_patches.astype(np.int64)
    return Counts(
        prompt_tokens=int(prompt.sum()),
        completion_tokens=int(own.sum()),
        prompt_pairs=int((prompt * (prompt + 1) // 2).sum()),
        completion_pairs=int((own * prompt[:, None] + own * (own + 1) // 2).sum()),
        patches=int(windows.sum()),
        window_pairs=int(np.square(windows).sum()),
        image_pairs=int(np.square(windows.sum(axis=1)).sum()),
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and which forward passes a step makes.

    Attributes:
        adapter_params: scalars of the adapter, all layers; 0 without.
        train_base: the language model's own weights get gradients.
        train_vision: the tower runs forward and backward in the update.
        num_old: forward passes for old log-probs, 0 or 1.
        num_reference: forward passes of the adapter-off policy, 0 or 1.
        remat: of `schema.ModelConfig`: none, dots or full.
    """

    adapter_params: int = 0
    train_base: bool = False
    train_vision: bool = False
    num_old: int = 0
    num_reference: int = 0
    remat: str = "none"

    @classmethod
    def of(cls, config: Config, adapter_params: int) -> Training:
        """What a step of a recipe computes."""
        return cls(
            adapter_params=adapter_params,
            train_base=config.model.train_base,
            train_vision=config.model.train_vision,
            num_old=int(config.needs_old_logprobs),
            num_reference=int(config.algo.kl_coef > 0),
            remat=config.model.remat,
        )


def text_weights(text: TextArch) -> int:
    """Weights of all layers' linear maps, biases and head left out."""
    width, kv = text.hidden_size, text.num_kv_heads * text.head_dim
    return text.num_layers * (2 * width**2 + 2 * width * kv + 3 * width * text.intermediate_size)


def linear_flops(text: TextArch, tokens: int, adapter_params: int = 0) -> int:
    """Forward FLOPs of the layers' linear maps."""
    return 2 * (text_weights(text) + adapter_params) * tokens


def attention_flops(text: TextArch, pairs: int) -> int:
    """Forward FLOPs of scores and outputs in all layers."""
    return 4 * text.num_layers * text.num_heads * text.head_dim * pairs


def head_flops(text: TextArch, tokens: int) -> int:
    """Forward FLOPs of the head."""
    return 2 * text.hidden_size * text.vocab_size * tokens


def vision_flops(vision: VisionArch, counts: Counts) -> int:
    """Forward FLOPs of the tower: patch embedding, blocks, merger."""
    width, inner = vision.hidden_size, vision.hidden_size * vision.merge_unit
    block = 4 * width**2 + 3 * width * vision.intermediate_size
    per_patch = vision.patch_dim * width + vision.depth * block
    merger = inner**2 + inner * vision.out_hidden_size
    full = len(vision.full_attention_blocks)
    pairs = full * counts.image_pairs + (vision.depth - full) * counts.window_pairs
    linear = per_patch * counts.patches + merger * (counts.patches // vision.merge_unit)
    return 2 * linear + 4 * width * pairs


def sampling_flops(arch: Arch, counts: Counts, adapter_params: int = 0) -> dict[str, int]:
    """Model FLOPs of a rollout: ``encode``, ``prefill``, ``decode``.

    Every sampled token runs through the layers once and is drawn from one row of the head.
    """
    text = arch.text
    return {
        "encode": vision_flops(arch.vision, counts),
        "prefill": linear_flops(text, counts.prompt_tokens, adapter_params)
        + attention_flops(text, counts.prompt_pairs),
        "decode": linear_flops(text, counts.completion_tokens, adapter_params)
        + attention_flops(text, counts.completion_pairs)
        + head_flops(text, counts.completion_tokens),
    }


def tree_flops(arch: Arch, counts: Counts, adapter_params: int = 0) -> int:
    """Forward FLOPs of the shared-prefix tree: each prompt once, the head on answers only."""
    text, tokens = arch.text, counts.prompt_tokens + counts.completion_tokens
    pairs = counts.prompt_pairs + counts.completion_pairs
    return (
        linear_flops(text, tokens, adapter_params)
        + attention_flops(text, pairs)
        + head_flops(text, counts.completion_tokens)
    )


def backward_flops(arch: Arch, counts: Counts, training: Training) -> int:
    """Backward FLOPs of the update, recomputation left out."""
    text, tokens = arch.text, counts.prompt_tokens + counts.completion_tokens
    pairs = counts.prompt_pairs + counts.completion_pairs
    weights = 2 if training.train_base else 1
    total = weights * (linear_flops(text, tokens) + head_flops(text, counts.completion_tokens))
    total += 2 * (2 * training.adapter_params * tokens) + 2 * attention_flops(text, pairs)
    return total + (2 * vision_flops(arch.vision, counts) if training.train_vision else 0)


def learning_flops(arch: Arch, counts: Counts, training: Training) -> dict[str, int]:
    """Model FLOPs of the rest of a step: ``old``, ``reference``, ``forward``, ``backward``."""
    forward = tree_flops(arch, counts, training.adapter_params)
    encode = vision_flops(arch.vision, counts) if training.train_vision else 0
    return {
        "old": training.num_old * (forward + encode),
        "reference": training.num_reference * (tree_flops(arch, counts) + encode),
        "forward": forward + encode,
        "backward": backward_flops(arch, counts, training),
    }


def update_hardware_flops(arch: Arch, counts: Counts, training: Training) -> int:
    """FLOPs of the update with what is computed twice: forward, backward, recomputation.

    The head's chunks are always recomputed; ``dots`` recomputes attention, ``full`` the layers.
    """
    text, tokens = arch.text, counts.prompt_tokens + counts.completion_tokens
    parts = learning_flops(arch, counts, training)
    total = parts["forward"] + parts["backward"] + head_flops(text, counts.completion_tokens)
    if training.remat in ("dots", "full"):
        total += attention_flops(text, counts.prompt_pairs + counts.completion_pairs)
    if training.remat == "full":
        total += linear_flops(text, tokens, training.adapter_params)
        total += vision_flops(arch.vision, counts) if training.train_vision else 0
    return total
