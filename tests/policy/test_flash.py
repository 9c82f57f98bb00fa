"""The TPU kernel, interpreted on CPU, against the plain attention: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.config.schema import MeshConfig
from speciarl_jax.devices.mesh import make_mesh
from speciarl_jax.policy import flash
from speciarl_jax.policy.attention import attend, attend_shared, causal_mask


def draw(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def interpreted(q, k, v, sees, offset):
    return flash.attend_splash(q, k, v, sees, offset=offset, is_interpreted=True)


def assert_same(plain, kernel, inputs, keep):
    """Values and gradients of the rows that `keep` selects."""
    np.testing.assert_allclose(plain(*inputs)[keep], kernel(*inputs)[keep], atol=2e-6)
    direction = draw(*inputs[0].shape, seed=9)
    grads = [
        jax.grad(lambda *x, f=f: jnp.sum((f(*x) * direction)[keep]), argnums=(0, 1, 2))(*inputs)
        for f in (plain, kernel)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_causal():
    q, k, v = draw(2, 21, 4, 16, seed=0), draw(2, 21, 2, 16, seed=1), draw(2, 21, 2, 16, seed=2)
    lengths = jnp.array([21, 13])
    sees = jnp.arange(21)[None] < lengths[:, None]
    assert_same(
        lambda q, k, v: attend(q, k, v, causal_mask(lengths, 21)),
        lambda q, k, v: interpreted(q, k, v, sees, 0),
        (q, k, v),
        np.asarray(sees),
    )


@pytest.mark.slow
def test_image_with_holes_and_odd_head_width():
    q, k, v = (draw(2, 140, 2, 80, seed=seed) for seed in range(3))
    mask = jax.random.bernoulli(jax.random.key(5), 0.8, (2, 140))
    assert_same(
        lambda q, k, v: attend(q, k, v, mask[:, None]),
        lambda q, k, v: interpreted(q, k, v, mask, None),
        (q, k, v),
        np.asarray(mask),
    )


@pytest.mark.slow
def test_group_on_a_mesh(monkeypatch):
    """Eight devices, each with its own prompts and heads; only the platform's name is set here."""
    monkeypatch.setattr(flash, "kernel_platform", lambda mesh, dtype: "tpu")
    whole = flash.attend_splash
    monkeypatch.setattr(
        flash, "attend_splash", lambda *x, offset: whole(*x, offset=offset, is_interpreted=True)
    )
    prompts, group, width, prompt_len = 4, 3, 5, 19
    q = draw(prompts, group, width, 4, 16, seed=0)
    k, v = (draw(prompts, group, width, 2, 16, seed=seed) for seed in (1, 2))
    prompt_k, prompt_v = (draw(prompts, prompt_len, 2, 16, seed=seed) for seed in (3, 4))
    sees = jnp.arange(prompt_len)[None] < jnp.array([19, 7, 12, 1])[:, None]
    mesh = make_mesh(MeshConfig(2, 2, 2))
    everything = np.ones((prompts, group, width), bool)
    assert_same(
        lambda q, k, v: attend_shared(q, k, v, prompt_k, prompt_v, sees),
        lambda q, k, v: flash.attend_group(q, k, v, prompt_k, prompt_v, sees, mesh),
        (q, k, v),
        everything,
    )


def test_plain_form_on_cpu():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    assert flash.kernel_platform(mesh, jnp.dtype(jnp.bfloat16)) == ""
    assert flash.kernel_platform(None, jnp.dtype(jnp.float32)) == ""
