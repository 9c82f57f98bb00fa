"""Architecture of a Qwen2.5-VL model: the numbers that data and policy both need.

Imports nothing of the package and never touches jax. `Arch.from_hf` reads a Hugging Face
``config.json`` in any of the styles in circulation: text fields flat (the hub's checkpoints) or
nested under ``text_config`` (transformers 5), ``rope_scaling`` or ``rope_parameters``.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from speciarl_jax.files import FETCH_MODEL, read_json

# Somebody else's config.json: what it holds is checked where it is read.
HfConfig: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionArch:
    """Vision tower. Sizes in patches unless the name says otherwise (`*_px`)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]
    patch_size_px: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size_px: int = 112
    in_channels: int = 3
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """A of the tower."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size_px**2

    @property
    def merge_unit(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size_px // self.spatial_merge_size // self.patch_size_px

    @property
    def window_patches(self) -> int:
        """Patches in one whole window."""
        return self.window_side**2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class TextArch:
    """Language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """A of the language model."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class Arch:
    """A whole Qwen2.5-VL model: both halves and the token ids that tie them together."""

    vision: VisionArch
    text: TextArch
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        """Checks what a wrong ``config.json`` would break later and less clearly."""
        vision, text = self.vision, self.text
        checks = [
            (text.hidden_size % text.num_heads == 0, "hidden_size must divide by num_heads"),
            (text.num_heads % text.num_kv_heads == 0, "num_heads must divide by num_kv_heads"),
            (
                sum(text.mrope_section) * 2 == text.head_dim,
                f"mrope_section {text.mrope_section} must add up to half the head dimension "
                f"({text.head_dim}/2)",
            ),
            (vision.hidden_size % vision.num_heads == 0, "vision width must divide by num_heads"),
            (vision.head_dim % 4 == 0, "vision head dimension must divide by 4"),
            (vision.window_side >= 1, "window_size must hold at least one merged token"),
            (
                vision.out_hidden_size == text.hidden_size,
                f"vision out_hidden_size {vision.out_hidden_size} must equal the text hidden_size "
                f"{text.hidden_size}",
            ),
            (
                all(0 <= i < vision.depth for i in vision.full_attention_blocks),
                f"fullatt_block_indexes {vision.full_attention_blocks} must lie below depth "
                f"{vision.depth}",
            ),
        ]
        for is_ok, message in checks:
            if not is_ok:
                raise ValueError(f"architecture: {message}")

    @classmethod
    def from_hf(cls, config: HfConfig) -> Arch:
        """Builds from the contents of a Hugging Face ``config.json``.

        Raises:
            ValueError: another model type, a rope or activation that is not implemented, a missing
                field; the message names it.
        Source: transformers Qwen2_5_VLConfig.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise ValueError(
                f"config.json: model_type {config.get('model_type')!r}, expected 'qwen2_5_vl'"
            )
        try:
            text = {**config, **_part(config, "text_config")}
            ids = ("image_token_id", "video_token_id", "vision_start_token_id",
                   "vision_end_token_id")  # fmt: skip
            if "vision_config" not in config:
                raise KeyError("vision_config")
            return cls(
                vision=_vision_from_hf(_part(config, "vision_config")),
                text=_text_from_hf(text, config),
                **{name: _size(config, name, least=0) for name in ids if name in config},
            )
        except KeyError as error:
            raise ValueError(f"config.json: field {error} is missing") from error

    @classmethod
    def from_dir(cls, path: str | pathlib.Path) -> Arch:
        """Reads ``path/config.json``.

        Raises:
            ValueError: no such file, not JSON, or not a Qwen2.5-VL configuration.
        """
        file = pathlib.Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(f"{file}: not found; expected a Hugging Face model directory")
        return cls.from_hf(read_json(file, FETCH_MODEL))


def _size(config: HfConfig, *names: str, default: int | None = None, least: int = 1) -> int:
    """A whole number under the first of `names` that is there.

    Raises:
        KeyError: none is, and there is no default.
        ValueError: it is no whole number of `least` or more.
    """
    name = next((name for name in names if config.get(name) is not None), names[0])
    value = config.get(name, default)
    if value is None:
        value = default
    if value is None:
        raise KeyError(name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not least <= value < 2**31:
        raise ValueError(f"config.json: {name}={value!r}: expected a size; {FETCH_MODEL}")
    return int(value)


def _sizes(config: HfConfig, name: str) -> tuple[int, ...]:
    """Whole numbers of 0 or more."""
    values = config[name]
    if not isinstance(values, list | tuple):
        raise ValueError(f"config.json: {name}={values!r}: expected a list; {FETCH_MODEL}")
    return tuple(_size({name: value}, name, least=0) for value in values)


def _number(config: HfConfig, name: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = config[name] if default is None else config.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name}={value!r}: expected a number > 0; {FETCH_MODEL}")
    return float(value)


def _part(config: HfConfig, name: str) -> HfConfig:
    """An object within the configuration, empty if it is not there."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name}={value!r}: expected an object; {FETCH_MODEL}")
    return value


def _vision_from_hf(config: HfConfig) -> VisionArch:
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"vision hidden_act {config['hidden_act']!r}: only 'silu' is implemented")
    return VisionArch(
        depth=_size(config, "depth"),
        hidden_size=_size(config, "hidden_size"),
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=_size(config, "num_heads"),
        out_hidden_size=_size(config, "out_hidden_size"),
        full_attention_blocks=_sizes(config, "fullatt_block_indexes"),
        patch_size_px=_size(config, "patch_size", "spatial_patch_size", default=14),
        temporal_patch_size=_size(config, "temporal_patch_size", default=2),
        spatial_merge_size=_size(config, "spatial_merge_size", default=2),
        window_size_px=_size(config, "window_size", default=112),
        in_channels=_size(config, "in_channels", "in_chans", default=3),
        rope_theta=_number(_part(config, "rope_parameters"), "rope_theta", 10_000.0),
    )


def _text_from_hf(text: HfConfig, root: HfConfig) -> TextArch:
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {text['hidden_act']!r}: only 'silu' is implemented")
    if text.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not implemented; Qwen2.5-VL ships with false")
    rope = _part(text, "rope_parameters") or _part(text, "rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ValueError(f"rope type {rope_type!r}: only 'default' and 'mrope' are implemented")
    if "mrope_section" not in rope:
        raise KeyError("rope_scaling.mrope_section")
    sections = _sizes(rope, "mrope_section")
    if len(sections) != 3:
        raise ValueError(f"config.json: mrope_section={list(sections)}: expected three numbers")
    heads = _size(text, "num_attention_heads")
    theta = _number(text, "rope_theta", 1_000_000.0)
    return TextArch(
        vocab_size=_size(text, "vocab_size"),
        hidden_size=_size(text, "hidden_size"),
        intermediate_size=_size(text, "intermediate_size"),
        num_layers=_size(text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(text, "num_key_value_heads", default=heads),
        mrope_section=(sections[0], sections[1], sections[2]),
        rope_theta=_number(rope, "rope_theta", theta),
        rms_norm_eps=_number(text, "rms_norm_eps"),
        tie_word_embeddings=bool(
            root.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        ),
    )
