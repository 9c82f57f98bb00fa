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


def _gated_mlp(
    key: str, path: str, size: int, inner: int, use_bias: bool, layer: int
) -> Iterator[Entry]:
    for name, d_in, d_out in (
        ("gate_proj", size, inner),
        ("up_proj", size, inner),
        ("down_proj", inner, size),
    ):
        yield from _linear(f"{key}.{name}", f"{path}/{name}", d_in, d_out, use_bias, layer)


def _norm(key: str, path: str, size: int, layer: int | None = None) -> Entry:
    return Entry(f"{key}.weight", (size,), (*path.split("/"), "weight"), layer)


def _vision_entries(arch: Arch) -> Iterator[Entry]:
    vision = arch.vision
    size, inner = vision.hidden_size, vision.intermediate_size
    patch = vision.patch_size_px
    conv_shape = (size, vision.in_channels, vision.temporal_patch_size, patch, patch)
    kernel_path = ("visual", "patch_embed", "kernel")
    yield Entry("visual.patch_embed.proj.weight", conv_shape, kernel_path, None, CONV)
    for layer in range(vision.depth):
        key, path = f"visual.blocks.{layer}", "visual/blocks"
        yield _norm(f"{key}.norm1", f"{path}/norm1", size, layer)
        yield _norm(f"{key}.norm2", f"{path}/norm2", size, layer)
        yield from _linear(f"{key}.attn.qkv", f"{path}/qkv", size, 3 * size, True, layer)
        yield from _linear(f"{key}.attn.proj", f"{path}/proj", size, size, True, layer)
        yield from _gated_mlp(f"{key}.mlp", f"{path}/mlp", size, inner, True, layer)
    merged = size * vision.merge_unit
    yield _norm("visual.merger.ln_q", "visual/merger/ln_q", size)
    for place, d_out in ((0, merged), (2, vision.out_hidden_size)):
        key, path = f"visual.merger.mlp.{place}", f"visual/merger/mlp_{place}"
        yield from _linear(key, path, merged, d_out, True)


def _text_entries(arch: Arch) -> Iterator[Entry]:
    text = arch.text
    size, inner = text.hidden_size, text.intermediate_size
    kv_size = text.num_kv_heads * text.head_dim
    table = (text.vocab_size, size)
    yield Entry("model.embed_tokens.weight", table, ("text", "embedding"))
    for layer in range(text.num_layers):
        key, path = f"model.layers.{layer}", "text/blocks"
        for norm in ("input", "post_attention"):
            yield _norm(f"{key}.{norm}_layernorm", f"{path}/{norm}_norm", size, layer)
        for letter, d_out in (("q", size), ("k", kv_size), ("v", kv_size), ("o", size)):
            name, use_bias = f"{letter}_proj", letter != "o"
            ours = f"{path}/{name}"
            yield from _linear(f"{key}.self_attn.{name}", ours, size, d_out, use_bias, layer)
        yield from _gated_mlp(f"{key}.mlp", f"{path}/mlp", size, inner, False, layer)
    yield _norm("model.norm", "text/norm", size)
    if not text.tie_word_embeddings:
        head = ("text", "lm_head", "kernel")
        yield Entry("lm_head.weight", table, head, None, TRANSPOSE)


def canonical_key(key: str) -> str:
    """Spells a checkpoint key of either layout as the hub's checkpoints do."""
    key = re.sub(r"^model\.visual\.", "visual.", key)
    return re.sub(r"^model\.language_model\.", "model.", key)


def spell_key(key: str, layout: str) -> str:
    """Spells a canonical key in a layout, HUB or NESTED."""
    if layout == HUB:
        return key
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
