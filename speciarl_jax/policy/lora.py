"""Adds low-rank adapters to a policy.

An adapted layer computes ``x W + (alpha / r) (x A) B`` with A from a uniform He initialisation and
B zero, so that training starts exactly at the base model.

Source: LoRA (arXiv 2106.09685); initialisation as peft's LoraLayer.reset_lora_parameters.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.policy.layers import Linear, LoRAParam
from speciarl_jax.policy.model import Policy


def adapted_paths(policy: Policy, targets: str) -> list[tuple[str, Linear]]:
    """Linear layers whose path (``text/blocks/q_proj``) `targets` finds, in a stable order."""
    found = []
    for path, module in nnx.iter_modules(policy):
        name = "/".join(map(str, path))
        if isinstance(module, Linear) and re.search(targets, name):
            found.append((name, module))
    return sorted(found, key=lambda item: item[0])


def add_lora(policy: Policy, config: LoraConfig, seed: int) -> None:
    """Adds adapters in place, float32 whatever the base is stored in; `seed` draws the A matrices.

    Raises:
        ValueError: the expression matches no layer.
    """
    layers = adapted_paths(policy, config.targets)
    if not layers:
        raise ValueError(f"lora.targets={config.targets!r} matches no layer; see docs/design.md")
    key = jax.random.key(seed)
    for index, (_, layer) in enumerate(layers):
        *stack, d_in, d_out = layer.kernel.shape
        bound = 1 / math.sqrt(d_in)  # He uniform with a = sqrt(5)
        a_shape, b_shape = (*stack, d_in, config.rank), (*stack, config.rank, d_out)
        a = jax.random.uniform(jax.random.fold_in(key, index), a_shape, minval=-bound, maxval=bound)
        layer.lora_a = LoRAParam(a)
        layer.lora_b = LoRAParam(jnp.zeros(b_shape))
        layer.lora_scale = config.alpha / config.rank
