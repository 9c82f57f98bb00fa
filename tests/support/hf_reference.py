"""Random Hugging Face models that show the known traps, and plain host arrays to feed them.

Everything here is written apart from the package (no import of its data room), so that a test
compares two independent readings of the reference.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE, VIDEO, START, END = 90, 91, 92, 93
VOCAB = 96


@dataclasses.dataclass(frozen=True)
class Spec:
    """One random configuration: small, but with every moving part."""

    seed: int = 0
    is_tied: bool = False
    mrope_section: tuple[int, int, int] = (2, 3, 3)
    num_heads: int = 4
    num_kv_heads: int = 2
    num_layers: int = 2
    vision_depth: int = 3
    full_blocks: tuple[int, ...] = (1,)
    window_px: int = 112
    vision_heads: int = 2
    grids: tuple[tuple[int, int], ...] = ((4, 6),)  # rows, columns in patches of 14 px
    vocab_size: int = VOCAB
    special_ids: dict[str, int] = dataclasses.field(
        default_factory=lambda: {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        }
    )

    @property
    def head_dim(self) -> int:
        return 2 * sum(self.mrope_section)


def config_dict(spec: Spec) -> dict[str, Any]:
    width = spec.num_heads * spec.head_dim
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vocab_size": spec.vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(spec.mrope_section)},
        "use_sliding_window": False,
        "tie_word_embeddings": spec.is_tied,
        "bos_token_id": 1,
        "eos_token_id": 95,
        **spec.special_ids,
        "torch_dtype": "float32",
        "vision_config": {
            "depth": spec.vision_depth,
            "hidden_size": 16 * spec.vision_heads,
            "intermediate_size": 48,
            "num_heads": spec.vision_heads,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": spec.window_px,
            "fullatt_block_indexes": list(spec.full_blocks),
            "hidden_act": "silu",
        },
    }


def random_model(spec: Spec) -> Qwen2_5_VLForConditionalGeneration:
    """An eager fp32 model whose attention is peaked and whose norms and biases are not trivial."""
    torch.manual_seed(spec.seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig(**config_dict(spec)), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                param.copy_(1 + 0.3 * torch.randn_like(param))
            elif name.endswith("bias"):
                param.copy_(0.2 * torch.randn_like(param))
            elif any(part in name for part in ("q_proj", "k_proj", "qkv")):
                param.copy_(0.25 * torch.randn_like(param))
            elif "patch_embed" in name:
                param.copy_(0.05 * torch.randn_like(param))
            else:
                param.copy_(0.12 * torch.randn_like(param))
    return model


def hub_key(key: str) -> str:
    """transformers 5's key as the hub's checkpoints spell it."""
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def save_model(
    model: Qwen2_5_VLForConditionalGeneration,
    spec: Spec,
    path: pathlib.Path,
    *,
    is_hub_layout: bool = True,
    num_shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> pathlib.Path:
    """Writes config.json and safetensors as the hub has them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_dict(spec)))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [95, 94]}))
    state = {
        (hub_key(key) if is_hub_layout else key): value.to(dtype).contiguous().clone()
        for key, value in model.state_dict().items()
        if not (spec.is_tied and key == "lm_head.weight")
    }
    if num_shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(state.items())[number::num_shards])
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One prompt for both sides: torch keyword arguments, and arrays for the policy."""

    torch: dict[str, torch.Tensor]
    ours: dict[str, np.ndarray]
    window_sources: list[np.ndarray]


def window_slots(rows: int, cols: int, side: int) -> list[tuple[int, int, int]]:
    """(index in raster of merge blocks, row, column) of every patch slot; -1 outside the image.

    Windows in raster order, merged tokens within them in raster order, four patches a token.
    """
    slots = []
    high, wide = rows // 2, cols // 2
    for top in range(0, high, side):
        for left in range(0, wide, side):
            for row in range(top, top + side):
                for col in range(left, left + side):
                    for part in range(4):
                        if row >= high or col >= wide:
                            slots.append((-1, 0, 0))
                        else:
                            place = (row * wide + col) * 4 + part
                            slots.append((place, 2 * row + part // 2, 2 * col + part % 2))
    return slots


def make_inputs(model: Any, spec: Spec, *, num_text: int = 12) -> Inputs:
    """Text, then every image of the spec with text after it; random pixels."""
    rng = np.random.default_rng(spec.seed)
    tokens: list[int] = []
    for rows, cols in spec.grids:
        tokens += rng.integers(1, 80, 3).tolist()
        tokens += [START, *([IMAGE] * (rows * cols // 4)), END]
    tokens += rng.integers(1, 80, num_text).tolist()
    patches = [rng.normal(size=(r * c, 1176)).astype(np.float32) for r, c in spec.grids]
    ids = torch.tensor([tokens])
    kwargs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.from_numpy(np.concatenate(patches)),
        "image_grid_thw": torch.tensor([(1, rows, cols) for rows, cols in spec.grids]),
    }
    positions, _ = model.model.get_rope_index(
        ids, kwargs["mm_token_type_ids"], kwargs["image_grid_thw"]
    )
    vision, rows_of_images, sources = _vision_arrays(spec, patches)
    image_rows = np.full((1, len(tokens)), -1, np.int32)
    image_rows[0, np.array(tokens) == IMAGE] = rows_of_images
    ours = {
        "tokens": np.array([tokens], np.int32),
        "positions": positions.permute(1, 0, 2).numpy().astype(np.int32),
        "lengths": np.array([len(tokens)], np.int32),
        "image_rows": image_rows,
        **vision,
    }
    return Inputs(kwargs, ours, sources)


def _vision_arrays(spec: Spec, patches: list[np.ndarray]):
    side = spec.window_px // 28
    slots = [np.array(window_slots(rows, cols, side)) for rows, cols in spec.grids]
    length = max(len(one) for one in slots)
    out = {
        "patches": np.zeros((len(slots), length, 1176), np.float32),
        "patch_positions": np.zeros((len(slots), length, 2), np.int32),
        "patch_mask": np.zeros((len(slots), length), bool),
    }
    merged_rows = []
    for image, (table, values) in enumerate(zip(slots, patches, strict=True)):
        is_real = table[:, 0] >= 0
        out["patches"][image, : len(table)][is_real] = values[table[is_real, 0]]
        out["patch_positions"][image, : len(table)] = table[:, 1:]
        out["patch_mask"][image, : len(table)] = is_real
        row_of_token = {int(p) // 4: slot // 4 for slot, p in enumerate(table[:, 0]) if p >= 0}
        merged_rows += [image * (length // 4) + row_of_token[t] for t in range(len(values) // 4)]
    return out, merged_rows, [table[table[:, 0] >= 0, 0] for table in slots]
