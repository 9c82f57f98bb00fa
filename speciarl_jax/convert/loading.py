"""Hugging Face checkpoints into a policy, one piece at a time.

Target arrays are created empty in their final place (device and sharding), then filled: the host
holds one piece of one tensor, never a model. What is wrong with a checkpoint is found from the
file headers, all of it, before anything is read.
"""

from __future__ import annotations

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from speciarl_jax.arch import Arch
from speciarl_jax.convert.names import SAME, Entry, canonical_key, checkpoint_entries, to_ours
from speciarl_jax.convert.orbax_dir import is_converted, load_params
from speciarl_jax.files import FETCH_MODEL, read_json
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import Policy, abstract_policy

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PIECE_BYTES = 64 * 2**20  # of a tensor, on the host at once
_STAGE_BYTES = 4 * 2**20  # parameters up to this size are assembled on the host: norms, biases
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def resolve_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The local directory of a checkpoint: `path` itself, or a download of the hub id `path`.

    Raises:
        ValueError: neither a directory nor a hub id that can be fetched (offline included).
    """
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path={str(path)!r}: no such directory, and fetching it from the Hugging Face "
            f"hub failed ({type(error).__name__}); give a local directory, or a hub id with "
            "network access"
        ) from error


def checkpoint_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model directory, single or sharded, in order.

    Raises:
        ValueError: none, a broken index, or a shard that the index names and nobody has.
    """
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index, FETCH_MODEL).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: not a safetensors index (no weight_map); {FETCH_MODEL}")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{index}: shards not found: {', '.join(missing)}")
        return [path / name for name in names]
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    raise ValueError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


@runtime_checkable
class _Slice(Protocol):
    """safetensors' reader of one tensor."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def checkpoint_tensors(
    files: Sequence[pathlib.Path],
) -> Iterator[tuple[pathlib.Path, str, _Slice]]:
    """(file, key, reader) of every tensor, read only when the reader is indexed.

    Raises:
        ValueError: not a whole safetensors file.
    """
    for file in files:
        try:
            opened = safe_open(file, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
        with opened as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield file, key, shard.get_slice(key)


def checkpoint_dtype(path: str | pathlib.Path) -> str:
    """``float32`` or ``bfloat16``, as the token embedding is stored.

    Raises:
        ValueError: no token embedding, or it has another dtype.
    """
    for file, key, tensor in checkpoint_tensors(checkpoint_files(pathlib.Path(path))):
        if canonical_key(key) == "model.embed_tokens.weight":
            name = tensor.get_dtype()
            if name in ("F32", "BF16"):
                return _DTYPES[name]
            raise ValueError(f"{file}: {key} is {name}, expected F32 or BF16")
    raise ValueError(f"{path}: no shard holds the token embedding")


def load_policy(
    path: str | pathlib.Path, dtypes: Dtypes, shardings: nnx.State[str, object] | None = None
) -> Policy:
    """Loads a checkpoint.

    Args:
        path: a model directory with ``config.json`` and safetensors, a hub id, or a directory that
            `speciarl convert` wrote.
        dtypes: storage and compute dtype; tensors are cast to the former.
        shardings: one Sharding per parameter in a state shaped like ``nnx.state(policy)``; None
            puts everything on jax's default device.

    Returns:
        The policy, without adapter.

    Raises:
        ValueError: no checkpoint there, or its keys, shapes or dtypes differ from what
            ``config.json`` asks for; the message lists every difference.
    """
    directory = resolve_checkpoint(path)
    if is_converted(directory):
        return load_params(directory, dtypes, shardings)
    arch = Arch.from_dir(directory)
    files = checkpoint_files(directory)
    entries = {entry.key: entry for entry in checkpoint_entries(arch)}
    _check_headers(files, entries, arch)
    policy = abstract_policy(arch, dtypes)
    targets = _Targets(nnx.state(policy), shardings)
    for _, key, tensor in checkpoint_tensors(files):
        if entry := entries.get(canonical_key(key)):
            targets.fill(entry, tensor)
    nnx.update(policy, targets.finish())
    for file, key, tensor in checkpoint_tensors(files):
        if canonical_key(key) not in entries:
            _check_tied_head(file, key, tensor, policy.text.embedding[...])
    return policy


def _check_headers(files: list[pathlib.Path], entries: dict[str, Entry], arch: Arch) -> None:
    problems: list[str] = []
    seen: collections.Counter[str] = collections.Counter()
    shapes = {key: entry.hf_shape for key, entry in entries.items()}
    if arch.text.tie_word_embeddings:  # the head may be there all the same
        shapes["lm_head.weight"] = (arch.text.vocab_size, arch.text.hidden_size)
    for _, key, header in checkpoint_tensors(files):
        canonical = canonical_key(key)
        seen[canonical] += 1
        expected, shape = shapes.get(canonical), tuple(header.get_shape())
        if expected is None:
            problems.append(f"unknown: {key}")
            continue
        if shape != expected:
            problems.append(f"shape: {key} is {shape}, expected {expected}")
        if header.get_dtype() not in _DTYPES:
            problems.append(f"dtype: {key} is {header.get_dtype()}, expected F32, F16 or BF16")
    problems += [f"missing: {key}" for key in entries if key not in seen]
    problems += [f"twice: {key}" for key, count in seen.items() if count > 1]
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise ValueError(
            f"{files[0].parent}: checkpoint does not fit its config.json, "
            f"{len(problems)} problems:\n  {listing}"
        )


def _check_tied_head(file: pathlib.Path, key: str, head: _Slice, embedding: jax.Array) -> None:
    """A tied checkpoint may repeat the embedding as its head, but not hold another one."""
    for start, stop in _row_ranges(embedding.shape, embedding.dtype):
        rows = np.asarray(head[start:stop]).astype(embedding.dtype)
        if not np.array_equal(rows, np.asarray(embedding[start:stop])):
            raise ValueError(
                f"{file}: config.json says tie_word_embeddings, but {key} differs from the "
                "embedding; set tie_word_embeddings to false in config.json"
            )


def _row_ranges(shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[tuple[int, int]]:
    row_bytes = max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize)
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class _Targets:
    """The policy's parameters while they are being filled.

    Small parameters are staged on the host; large ones live in their final place from the start
    and take each piece by a donated in-place update.
    """

    def __init__(
        self, state: nnx.State[str, object], shardings: nnx.State[str, object] | None
    ) -> None:
        self._variables: dict[PathParts, nnx.Variable[jax.Array]] = dict(nnx.to_flat_state(state))
        self._shardings: dict[PathParts, Sharding | None] = dict.fromkeys(self._variables)
        if shardings is not None:
            for path, leaf in nnx.to_flat_state(shardings):
                self._shardings[path] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        self._arrays: dict[PathParts, np.ndarray | jax.Array] = {}

    def fill(self, entry: Entry, tensor: _Slice) -> None:
        """Reads one tensor into its place."""
        spec = self._variables[entry.path].get_value()
        if math.prod(spec.shape) * spec.dtype.itemsize <= _STAGE_BYTES:
            staged = self._arrays.setdefault(entry.path, np.empty(spec.shape, spec.dtype))
            target = staged if entry.layer is None else staged[entry.layer]
            target[...] = to_ours(tensor[:], entry.transform)
            return
        sharding = self._shardings[entry.path]
        array = self._arrays.get(entry.path)
        if not isinstance(array, jax.Array):
            array = _zeros(spec.shape, spec.dtype, sharding)
        row_axis = int(entry.layer is not None) if entry.transform == SAME else len(spec.shape) - 1
        ranges = [(0, entry.hf_shape[0])]
        if not _is_split(sharding, row_axis):
            ranges = list(_row_ranges(entry.hf_shape, spec.dtype))
        for start, stop in ranges:
            offsets = np.zeros(len(spec.shape), np.int32)
            offsets[row_axis] = start
            if entry.layer is not None:
                offsets[0] = entry.layer
            piece = np.ascontiguousarray(to_ours(tensor[start:stop], entry.transform), spec.dtype)
            piece = piece.reshape((1,) * (len(spec.shape) - piece.ndim) + piece.shape)
            write = _writer(sharding)
            array = self._arrays[entry.path] = write(array, piece, offsets)
            array.block_until_ready()  # or pieces pile up on the host

    def finish(self) -> nnx.State[str, object]:
        """The filled state; staged parameters move to their place."""
        for path, array in self._arrays.items():
            if isinstance(array, np.ndarray):
                self._arrays[path] = jax.device_put(array, self._shardings[path])
        return nnx.from_flat_state(
            [(path, var.replace(self._arrays[path])) for path, var in self._variables.items()]
        )


def _is_split(sharding: Sharding | None, axis: int) -> bool:
    """Whether an axis is spread over devices, so that pieces must cover it whole."""
    if not isinstance(sharding, NamedSharding):
        return False
    spec = sharding.spec
    return axis < len(spec) and spec[axis] is not None


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    make = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    zeros: jax.Array = make()
    return zeros


@functools.lru_cache(maxsize=64)
def _writer(sharding: Sharding | None) -> Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]:
    """In-place write of a piece at an offset, for parameters placed by `sharding`."""

    def write(buffer: jax.Array, piece: jax.Array, offsets: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(buffer, piece, tuple(offsets))

    replicated = None
    if isinstance(sharding, NamedSharding):
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
    placed = (sharding, sharding, replicated)  # a piece has the parameter's rank, so its layout
    return jax.jit(write, donate_argnums=0, in_shardings=placed, out_shardings=sharding)
