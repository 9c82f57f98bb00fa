"""One table between our parameters and Hugging Face's: name, layer, layout of the numbers.

Keys are *canonical* inside this room: the spelling of the hub's checkpoints (``visual.*``,
``model.layers.*``, ``lm_head.weight``). transformers 5 writes ``model.visual.*`` and
``model.language_model.*``; `canonical_key` reads both, `spell_key` writes either.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from speciarl_jax.arch import Arch

HUB = "hub"  # visual.*, model.layers.*
NESTED = "nested"  # model.visual.*, model.language_model.layers.*

SAME = "same"  # as it is
TRANSPOSE = "transpose"  # torch Linear [out, in] -> ours [in, out]
CONV = "conv"  # torch Conv3d [out, C, t, h, w] over whole patches -> ours [C*t*h*w, out]

Path = tuple[str, ...]

_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_VISION_LINEARS = {"qkv": "attn.qkv", "proj": "attn.proj"} | {
    f"mlp/{name}": f"mlp.{name}" for name in _GATED_MLP
}
_TEXT_LINEARS = {f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"} | {
    f"mlp/{name}": f"mlp.{name}" for name in _GATED_MLP
}
_TEXT_BIASED = ("q_proj", "k_proj", "v_proj")
_TEXT_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and where it goes.

    Attributes:
        key: canonical Hugging Face key.
        hf_shape: its shape there.
        path: of our parameter, e.g. ``("text", "blocks", "q_proj", "kernel")``.
        layer: index into our parameter's leading layer axis; None if it has none.
        transform: SAME, TRANSPOSE or CONV.
    """

    key: str
    hf_shape: tuple[int, ...]
    path: Path
    layer: int | None = None
    transform: str = SAME


def checkpoint_entries(arch: Arch) -> list[Entry]:
    """Every tensor of a checkpoint of this architecture, in the order of the computation."""
    return [*_vision_entries(arch), *_text_entries(arch)]


def _linear(
    key: str, path: str, d_in: int, d_out: int, use_bias: bool, layer: int | None = None
) -> Iterator[Entry]:
    parts = tuple(path.split("/"))
    yield Entry(f"{key}.weight", (d_out, d_in), (*parts, "kernel"), layer, TRANSPOSE)
    if use_bias:
        yield Entry(f"{key}.bias", (d_out,), (*parts, "bias"), layer)


def _vision_entries(arch: Arch) -> Iterator[Entry]:
    vision = arch.vision
    size, inner = vision.hidden_size, vision.intermediate_size
    patch = vision.patch_size_px
    conv_shape = (size, vision.in_channels, vision.temporal_patch_size, patch, patch)
    kernel_path = ("visual", "patch_embed", "kernel")
    yield Entry("visual.patch_embed.proj.weight", conv_shape, kernel_path, None, CONV)
    sizes = {
        "qkv": (size, 3 * size),
        "proj": (size, size),
        "mlp/gate_proj": (size, inner),
        "mlp/up_proj": (size, inner),
        "mlp/down_proj": (inner, size),
    }
    for layer in range(vision.depth):
        prefix = f"visual.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            path = ("visual", "blocks", norm, "weight")
            yield Entry(f"{prefix}.{norm}.weight", (size,), path, layer)
        for ours, theirs in _VISION_LINEARS.items():
            d_in, d_out = sizes[ours]
            yield from _linear(
                f"{prefix}.{theirs}", f"visual/blocks/{ours}", d_in, d_out, True, layer
            )
    merged = size * vision.merge_unit
    yield Entry("visual.merger.ln_q.weight", (size,), ("visual", "merger", "ln_q", "weight"))
    yield from _linear("visual.merger.mlp.0", "visual/merger/mlp_0", merged, merged, True)
    out_size = vision.out_hidden_size
    yield from _linear("visual.merger.mlp.2", "visual/merger/mlp_2", merged, out_size, True)


def _text_entries(arch: Arch) -> Iterator[Entry]:
    text = arch.text
    size, inner = text.hidden_size, text.intermediate_size
    kv_size = text.num_kv_heads * text.head_dim
    table = (text.vocab_size, size)
    yield Entry("model.embed_tokens.weight", table, ("text", "embedding"))
    sizes = {
        "q_proj": (size, size),
        "k_proj": (size, kv_size),
        "v_proj": (size, kv_size),
        "o_proj": (size, size),
        "mlp/gate_proj": (size, inner),
        "mlp/up_proj": (size, inner),
        "mlp/down_proj": (inner, size),
    }
    for layer in range(text.num_layers):
        prefix = f"model.layers.{layer}"
        for ours, theirs in _TEXT_NORMS.items():
            path = ("text", "blocks", ours, "weight")
            yield Entry(f"{prefix}.{theirs}.weight", (size,), path, layer)
        for ours, theirs in _TEXT_LINEARS.items():
            use_bias = ours in _TEXT_BIASED
            d_in, d_out = sizes[ours]
            yield from _linear(
                f"{prefix}.{theirs}", f"text/blocks/{ours}", d_in, d_out, use_bias, layer
            )
    yield Entry("model.norm.weight", (size,), ("text", "norm", "weight"))
    if not text.tie_word_embeddings:
        head = ("text", "lm_head", "kernel")
        yield Entry("lm_head.weight", table, head, None, TRANSPOSE)


def canonical_key(key: str) -> str:
    """Spells a checkpoint key of either layout as the hub's checkpoints do."""
    key = re.sub(r"^model\.visual\.", "visual.", key)
    return re.sub(r"^model\.language_model\.", "model.", key)


def spell_key(key: str, layout: str) -> str:
    """Spells a canonical key in a layout.

    Raises:
        ValueError: `layout` is neither HUB nor NESTED.
    """
    if layout == HUB:
        return key
    if layout != NESTED:
        raise ValueError(f"key layout {layout!r}: expected {HUB!r} or {NESTED!r}")
    key = re.sub(r"^model\.", "model.language_model.", key)
    return re.sub(r"^visual\.", "model.visual.", key)


def find_layout(keys: Iterable[str]) -> str:
    """The layout that checkpoint keys are spelled in."""
    nested = ("model.visual.", "model.language_model.")
    return NESTED if any(key.startswith(nested) for key in keys) else HUB


def to_ours(array: np.ndarray, transform: str) -> np.ndarray:
    """Lays a checkpoint tensor, or a run of its leading rows, out as ours; a view if possible."""
    if transform == SAME:
        return array
    return array.reshape(len(array), -1).T


def to_hf(array: np.ndarray, entry: Entry) -> np.ndarray:
    """Lays one layer of our parameter out as Hugging Face's tensor, contiguous."""
    if entry.transform != SAME:
        array = array.T
    return np.ascontiguousarray(array).reshape(entry.hf_shape)
