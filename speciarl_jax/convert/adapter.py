"""The adapter in and out of PEFT format: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import re
from typing import cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.convert.names import NESTED, Entry, canonical_key, checkpoint_entries, spell_key
from speciarl_jax.files import read_json, whole_file, write_whole
from speciarl_jax.policy.layers import Linear, LoRAParam
from speciarl_jax.policy.lora import adapted_paths
from speciarl_jax.policy.model import Policy, PolicyParts
from speciarl_jax.types import JsonObject, JsonValue

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight$")
# field of adapter_config.json -> values that mean "not used"
_UNSUPPORTED: dict[str, tuple[JsonValue, ...]] = {
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


def whole_policy(policy_or_parts: Policy | PolicyParts) -> Policy:
    """Puts a policy that was taken apart for training together again; copies nothing."""
    if isinstance(policy_or_parts, Policy):
        return policy_or_parts
    parts = policy_or_parts
    return nnx.merge(parts.graphdef, parts.trainable, parts.frozen)


def adapted_layers(policy: Policy) -> list[tuple[str, Linear]]:
    """Linear layers that carry an adapter, by path, in a stable order."""
    return [(name, layer) for name, layer in adapted_paths(policy, "") if layer.lora_scale]


def _kernel_entries(policy: Policy) -> dict[str, list[Entry]]:
    """Path of each linear layer -> its checkpoint entries, one a layer of the stack, in order."""
    found: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in checkpoint_entries(policy.arch):
        if entry.path[-1] == "kernel":
            found["/".join(entry.path[:-1])].append(entry)
    return found


def _module_key(entry: Entry) -> str:
    """``model.language_model.layers.3.mlp.up_proj``: the module's name in transformers 5."""
    return spell_key(entry.key, NESTED).removesuffix(".weight")


def save_peft(
    policy_or_parts: Policy | PolicyParts,
    lora_config: LoraConfig,
    base_name: str,
    out_dir: str | pathlib.Path,
) -> None:
    """Writes the adapter so that ``peft.PeftModel.from_pretrained`` loads it onto the HF model.

    Args:
        policy_or_parts: with an adapter, whole or taken apart.
        lora_config: the adapter's rank and alpha.
        base_name: hub id or directory of the base model, as PEFT shall look for it.
        out_dir: created if need be.

    Raises:
        ValueError: the policy has no adapter, or one of another rank or alpha.
    Source: peft get_peft_model_state_dict, LoraConfig. ``target_modules`` is a full regular
        expression, because bare names such as ``up_proj`` would match the vision tower too.
    """
    policy, out = whole_policy(policy_or_parts), pathlib.Path(out_dir)
    layers = adapted_layers(policy)
    if not layers:
        raise ValueError("the policy has no adapter; export to 'hf' instead")
    kernels = _kernel_entries(policy)
    tensors: dict[str, np.ndarray] = {}
    for name, layer in layers:
        _check_scale(name, layer, lora_config)
        for entry in kernels[name]:
            index = ... if entry.layer is None else entry.layer
            prefix = _PREFIX + _module_key(entry)
            for letter, param in (("A", layer.lora_a), ("B", layer.lora_b)):
                value = np.ascontiguousarray(np.asarray(param[index]).T)
                tensors[f"{prefix}.lora_{letter}.weight"] = value
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / WEIGHTS_FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    targets = sorted({_pattern(entry) for name, _ in layers for entry in kernels[name]})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora_config.rank,
        "lora_alpha": lora_config.alpha,
        "lora_dropout": 0.0,
        "target_modules": f"({'|'.join(targets)})",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_whole(out / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _pattern(entry: Entry) -> str:
    return re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", re.escape(_module_key(entry)), count=1)


def _check_scale(name: str, layer: Linear, config: LoraConfig) -> None:
    rank, alpha = layer.lora_a.shape[-1], layer.lora_scale * layer.lora_a.shape[-1]
    if rank != config.rank or not np.isclose(alpha, config.alpha):
        raise ValueError(
            f"{name}: adapter has rank {rank}, alpha {alpha:g}; the configuration says rank "
            f"{config.rank}, alpha {config.alpha:g}"
        )


def load_peft(path: str | pathlib.Path, policy: Policy) -> LoraConfig:
    """Puts a PEFT adapter onto a policy, in place, float32 whatever it was stored in.

    Args:
        path: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        policy: takes the adapter; one that it already has is replaced.

    Returns:
        The adapter's rank, alpha and (our) target paths, as `add_lora` would take them.

    Raises:
        ValueError: files missing, a variant that is not implemented (DoRA, rsLoRA, patterns of
            ranks, trained biases), unknown or mis-shaped tensors, or layers of a stack left out;
            the message lists all of them.
    Source: peft LoraConfig, key names of transformers 4 and 5.
    """
    directory = pathlib.Path(path)
    rank, alpha = _rank_and_alpha(directory)
    if not (directory / WEIGHTS_FILE).is_file():
        raise ValueError(f"{directory / WEIGHTS_FILE}: not found")
    tensors, problems = _by_module(load_file(directory / WEIGHTS_FILE))
    stacks: dict[str, list[list[np.ndarray]]] = {}
    for name, entries in _kernel_entries(policy).items():
        for letter in "AB":
            found = [tensors.pop((_module_key(entry), letter), None) for entry in entries]
            if all(tensor is None for tensor in found):
                continue
            d_out, d_in = entries[0].hf_shape[0], math.prod(entries[0].hf_shape[1:])
            expected = (rank, d_in) if letter == "A" else (d_out, rank)
            for entry, tensor in zip(entries, found, strict=True):
                key = f"{_module_key(entry)}.lora_{letter}"
                if tensor is None:
                    problems.append(f"missing: {key} (its stack has others)")
                elif tensor.shape != expected:
                    problems.append(f"shape: {key} is {tensor.shape}, expected {expected}")
            stacks.setdefault(name, []).append([one for one in found if one is not None])
    problems += [f"unknown: {module}.lora_{letter}" for module, letter in tensors]
    problems += [f"A or B missing: {name}" for name, pair in stacks.items() if len(pair) != 2]
    if problems or not stacks:
        listing = "\n  ".join(sorted(problems) or ["no adapter tensors"])
        raise ValueError(f"{directory}: adapter does not fit the policy:\n  {listing}")
    _attach(policy, stacks, alpha / rank)
    return LoraConfig(rank=rank, alpha=alpha, targets=f"^({'|'.join(sorted(stacks))})$")


def _rank_and_alpha(directory: pathlib.Path) -> tuple[int, float]:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file}: not found; expected a PEFT adapter directory")
    config: JsonObject = read_json(file, "fetch or export the adapter again")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {config.get('peft_type')!r}, expected 'LORA'")
    used = [name for name, off in _UNSUPPORTED.items() if config.get(name) not in off]
    missing = [name for name in ("r", "lora_alpha") if name not in config]
    if used or missing:
        raise ValueError(f"{file}: not implemented: {used}; missing: {missing}")
    return int(cast(int, config["r"])), float(cast(float, config["lora_alpha"]))


def _by_module(
    tensors: dict[str, np.ndarray],
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """Tensors by module and letter, and what is wrong with the others."""
    found, problems = {}, []
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            found[spell_key(canonical_key(match[1]), NESTED), match[2]] = tensor
        else:
            problems.append(f"unknown: {key}")
    return found, problems


def _attach(policy: Policy, stacks: dict[str, list[list[np.ndarray]]], scale: float) -> None:
    for name, layer in adapted_paths(policy, ""):
        if name not in stacks:
            continue
        for letter, tensors in zip("ab", stacks[name], strict=True):
            array = np.stack([tensor.T.astype(np.float32) for tensor in tensors])
            is_stack = name.split("/")[1] == "blocks"
            setattr(
                layer, f"lora_{letter}", LoRAParam(jnp.asarray(array if is_stack else array[0]))
            )
        layer.lora_scale = scale
