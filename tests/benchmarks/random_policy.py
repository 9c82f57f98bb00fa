"""Random checkpoints and prompts of the peer benchmarks, the same bytes for both sides."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from speciarl_jax.arch import Arch
from speciarl_jax.convert.export import save_hf
from speciarl_jax.data.images import ImageLimits, grid_of, resize_image
from speciarl_jax.data.positions import mrope_positions
from speciarl_jax.data.prompts import EncodedPrompt
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import Policy
from tests.support.hf_order import hf_order

LIMITS = ImageLimits(28 * 28, 28 * 28 * 1280)
_SPECIAL = {"vision_start": 1, "vision_end": 2, "image": 3, "video": 4}  # token ids


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark model; names as in Hugging Face's configuration."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    vision_depth: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_heads: int
    window_px: int

    def hf_config(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        half = self.hidden_size // self.num_heads // 2
        section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "max_position_embeddings": 4096,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "vision_start_token_id": _SPECIAL["vision_start"],
            "vision_end_token_id": _SPECIAL["vision_end"],
            "image_token_id": _SPECIAL["image"],
            "video_token_id": _SPECIAL["video"],
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": self.vision_depth,
                "hidden_size": self.vision_hidden_size,
                "intermediate_size": self.vision_intermediate_size,
                "num_heads": self.vision_heads,
                "out_hidden_size": self.hidden_size,
                "fullatt_block_indexes": list(range(1, self.vision_depth, 2)),
                "window_size": self.window_px,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "in_channels": 3,
                "hidden_act": "silu",
            },
        }


TINY = Shape(128, 256, 4, 4, 2, 1024, 4, 96, 192, 4, 56)  # 1.5 M parameters
MIDDLE = Shape(512, 2048, 12, 8, 2, 16384, 4, 256, 512, 4, 112)  # 60 M


def write_checkpoint(shape: Shape, path: pathlib.Path) -> Arch:
    """Writes a random float32 model as a Hugging Face directory (no tokenizer)."""
    config = shape.hf_config()
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    policy = Policy(Arch.from_hf(config), dtypes=Dtypes(), rngs=nnx.Rngs(0))
    save_hf(policy, path, path, dtype="float32")
    return policy.arch


def load_peer(path: pathlib.Path) -> Any:
    """transformers' model of the directory: float32, its default attention (sdpa)."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def random_images(sizes_px: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """One noise picture for each (height, width)."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        for high, wide in sizes_px
    ]


def encode_prompts(
    images: Sequence[Image.Image], arch: Arch, num_text_tokens: int
) -> list[EncodedPrompt]:
    """Prompts of the form: text, image, text, in random tokens.

    Args:
        images: one per prompt; sides are multiples of 28 px.
        arch: token ids, patch and merge sizes.
        num_text_tokens: tokens of a prompt that are not the image's placeholders.
    """
    rng = np.random.default_rng(1)
    prompts = []
    for number, image in enumerate(images):
        pixels = resize_image(image, arch.vision, LIMITS)
        grid = grid_of(pixels, arch.vision)
        count = grid[1] * grid[2] // arch.vision.merge_unit
        text = rng.integers(10, arch.text.vocab_size, num_text_tokens - 2)
        before, after = text[:10], text[10:]
        start, end = arch.vision_start_token_id, arch.vision_end_token_id
        placeholders = np.full(count, arch.image_token_id)
        tokens = np.concatenate([before, [start], placeholders, [end], after]).astype(np.int32)
        positions, delta = mrope_positions(tokens, [grid], arch)
        name = f"random/{number}"
        prompts.append(
            EncodedPrompt(
                prompt_id=name,
                ground_truth="",
                dataset="",
                tokens=tokens,
                longest_tokens=len(tokens),
                positions=positions,
                delta=delta,
                images=(b"",),
                pixels=(pixels,),
            )
        )
    return prompts


def peer_inputs(
    images: Sequence[Image.Image], prompts: Sequence[EncodedPrompt], arch: Arch
) -> dict[str, Any]:
    """The same prompts as keyword arguments of transformers' model, padded on the left."""
    import torch

    length = max(len(prompt.tokens) for prompt in prompts)
    tokens = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros((len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt.tokens) :] = prompt.tokens
        mask[row, length - len(prompt.tokens) :] = 1
    patched = [hf_order(image, arch.vision, LIMITS) for image in images]
    return {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": torch.from_numpy((tokens == arch.image_token_id).astype(np.int64)),
        "pixel_values": torch.from_numpy(np.concatenate([patches for patches, _ in patched])),
        "image_grid_thw": torch.tensor([grid for _, grid in patched]),
    }
