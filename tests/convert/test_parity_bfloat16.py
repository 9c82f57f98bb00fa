"""In bfloat16 we are as close to the float32 model as transformers' own bfloat16 is."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from speciarl_jax.convert.loading import load_policy
from speciarl_jax.convert.parity.torch_reference import capture_activations
from speciarl_jax.policy.layers import Dtypes
from tests.convert.test_parity_components import ours_like_torch
from tests.support.hf_reference import Spec, make_inputs, random_model, save_model

SPECS = [
    Spec(seed=5, window_px=56, grids=((10, 6), (4, 4), (2, 2)), full_blocks=(2,)),
    Spec(seed=2, grids=((4, 40),)),
    Spec(seed=11, is_tied=True, num_layers=4, num_kv_heads=1, grids=((12, 8), (4, 22))),
]


def mean_error(found, reference):
    """Component -> mean absolute difference, relative to the reference's mean size."""
    return {
        name: float(
            np.mean(np.abs(np.asarray(found[name], np.float32).reshape(value.shape) - value))
            / np.mean(np.abs(value))
        )
        for name, value in reference.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"seed{spec.seed}")
def test_no_further_from_float32_than_torch(spec, tmp_path):
    model = random_model(spec)
    inputs = make_inputs(model, spec)
    exact = capture_activations(model, inputs.torch)
    torch_half = capture_activations(
        copy.deepcopy(model).to(torch.bfloat16),
        {
            name: value.to(torch.bfloat16) if value.is_floating_point() else value
            for name, value in inputs.torch.items()
        },
    )
    policy = load_policy(save_model(model, spec, tmp_path), Dtypes(jnp.bfloat16, jnp.bfloat16))
    ours = ours_like_torch(policy, inputs, inputs.ours["patch_mask"])
    theirs, mine = mean_error(torch_half, exact), mean_error(ours, exact)
    assert min(theirs.values()) > 1e-4  # bfloat16 it is
    for name, error in mine.items():
        assert error <= 1.25 * theirs[name], f"{name}: {error:.2e}, torch {theirs[name]:.2e}"
