"""A policy out to a Hugging Face directory, the adapter merged or left out."""

from __future__ import annotations

import json
import math
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from speciarl_jax.arch import Arch
from speciarl_jax.convert.adapter import adapted_layers, whole_policy
from speciarl_jax.convert.loading import INDEX_FILE, checkpoint_files, checkpoint_tensors
from speciarl_jax.convert.names import HUB, Entry, checkpoint_entries, find_layout, spell_key, to_hf
from speciarl_jax.files import FETCH_MODEL, read_json, whole_file, write_whole
from speciarl_jax.policy.model import Policy, PolicyParts
from speciarl_jax.types import JsonValue

_DTYPES = ("float32", "bfloat16")
_SIDE_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_NOT_COPIED = {INDEX_FILE, "adapter_config.json"}
_DTYPE_FIELDS = ("dtype", "torch_dtype")


def save_hf(
    policy_or_parts: Policy | PolicyParts,
    source_dir: str | pathlib.Path,
    out_dir: str | pathlib.Path,
    dtype: str = "bfloat16",
    *,
    merge_adapter: bool = True,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes safetensors, and copies configuration, tokenizer and processor files.

    Keys are spelled as in `source_dir`. A policy loaded in the dtype it is saved in comes back bit
    for bit. The host holds one shard at a time.

    Args:
        policy_or_parts: whole or taken apart.
        source_dir: model directory that the policy was made from; gives all other files.
        out_dir: created if need be; must not hold a model yet.
        dtype: of the tensors written, ``bfloat16`` or ``float32``.
        merge_adapter: fold the adapter into the weights, W + scale A B computed in float32; False
            writes the base model.
        max_shard_bytes: size at which a new shard begins.

    Raises:
        ValueError: another dtype, an `out_dir` that holds a model, a `source_dir` of another
            architecture, or parameters that this process does not hold whole.
    Source: transformers save_pretrained (file names, index); huggingface_hub parts the shards.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    policy = whole_policy(policy_or_parts)
    source, out = pathlib.Path(source_dir), pathlib.Path(out_dir)
    if Arch.from_dir(source) != policy.arch:
        raise ValueError(f"{source}: config.json describes another architecture than the policy")
    if any(out.glob("*.safetensors")):
        raise ValueError(f"{out}: already holds a model; give an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    layout, stored = _source_layout(source), jnp.dtype(dtype)
    entries = {spell_key(entry.key, layout): entry for entry in checkpoint_entries(policy.arch)}
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: math.prod(entry.hf_shape) * stored.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    reader = _Reader(policy, stored, merge_adapter)
    for name, keys in shards.filename_to_tensors.items():
        tensors = {key: reader.read(entries[key]) for key in keys}
        with whole_file(out / name) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_whole(out / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    copy_side_files(source, out, dtype)


def copy_side_files(source: pathlib.Path, out: pathlib.Path, dtype: str | None = None) -> None:
    """Copies everything but weights: configuration, tokenizer, processor, chat template.

    Args:
        source, out: model directory, existing directory.
        dtype: written into config.json where that names one; None copies it as it is.
    """
    for file in sorted(source.iterdir()) if source.resolve() != out.resolve() else []:
        if file.is_file() and file.suffix in _SIDE_SUFFIXES and file.name not in _NOT_COPIED:
            write_whole(out / file.name, file.read_bytes())
    if dtype is not None:
        config = read_json(source / "config.json", FETCH_MODEL)
        renamed = _with_dtype(config, dtype)
        if renamed != config:
            write_whole(out / "config.json", json.dumps(renamed, indent=2) + "\n")


def _with_dtype(config: JsonValue, dtype: str) -> JsonValue:
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in _DTYPE_FIELDS and value is not None else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _source_layout(source: pathlib.Path) -> str:
    """Spelling of the keys of `source`, the hub's if it holds no weights of that format."""
    if not any(source.glob("*.safetensors")):
        return HUB
    return find_layout(key for _, key, _ in checkpoint_tensors(checkpoint_files(source)))


class _Reader:
    """Reads single Hugging Face tensors off a policy."""

    def __init__(self, policy: Policy, dtype: np.dtype, merge_adapter: bool) -> None:
        self._variables = dict(nnx.to_flat_state(nnx.state(policy)))
        self._dtype = dtype
        layers = adapted_layers(policy) if merge_adapter else []
        self._adapted = {(*name.split("/"), "kernel"): layer for name, layer in layers}

    def read(self, entry: Entry) -> np.ndarray:
        """One tensor, in Hugging Face's layout."""
        value = _one_layer(self._variables[entry.path].get_value(), entry.layer)
        layer = self._adapted.get(entry.path)
        if layer is not None:
            low_a = _one_layer(layer.lora_a[...], entry.layer)
            low_b = _one_layer(layer.lora_b[...], entry.layer)
            delta = low_a.astype(np.float32) @ low_b.astype(np.float32)
            value = value.astype(np.float32) + np.float32(layer.lora_scale) * delta
        return to_hf(value.astype(self._dtype), entry)


def _one_layer(array: jax.Array, layer: int | None) -> np.ndarray:
    if not array.is_fully_addressable:
        raise ValueError("export: parameters are spread over several processes; export from one")
    return np.asarray(array if layer is None else array[layer])
