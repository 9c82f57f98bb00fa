"""Checkpoints in: layouts, shards, placement, and everything that can be wrong with one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file

from speciarl_jax.convert import loading
from speciarl_jax.convert.loading import load_policy
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import abstract_policy
from tests.support.hf_reference import Spec, random_model, save_model

DEVICE_FILL_BYTES = 20_000  # larger parameters are written piece by piece into their final place


@pytest.fixture(scope="module")
def spec():
    return Spec(seed=3)


@pytest.fixture(scope="module")
def model(spec):
    return random_model(spec)


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), nnx.state(a), nnx.state(b)))


def test_values_land_where_they_belong(model, spec, tmp_path):
    policy = load_policy(save_model(model, spec, tmp_path), Dtypes())
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    text, visual = policy.text, policy.visual
    q = state["model.language_model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(text.blocks.q_proj.kernel[1], q.T)
    np.testing.assert_array_equal(
        text.embedding[...], state["model.language_model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(text.lm_head.kernel[...], state["lm_head.weight"].T)
    conv = state["model.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(visual.patch_embed.kernel[...], conv.reshape(len(conv), -1).T)
    bias = state["model.visual.blocks.2.mlp.down_proj.bias"]
    np.testing.assert_array_equal(visual.blocks.mlp.down_proj.bias[2], bias)


@pytest.mark.parametrize(
    ("is_hub_layout", "num_shards", "stage_bytes"),
    [(True, 3, 4 * 2**20), (False, 1, 4 * 2**20), (False, 3, DEVICE_FILL_BYTES)],
)
def test_layouts_shards_and_both_ways_of_filling_agree(
    model, spec, tmp_path, monkeypatch, is_hub_layout, num_shards, stage_bytes
):
    reference = load_policy(save_model(model, spec, tmp_path / "a"), Dtypes())
    monkeypatch.setattr(loading, "_STAGE_BYTES", stage_bytes)
    monkeypatch.setattr(loading, "_PIECE_BYTES", 5000)
    other = save_model(
        model, spec, tmp_path / "b", is_hub_layout=is_hub_layout, num_shards=num_shards
    )
    assert _same(reference, load_policy(other, Dtypes()))


def _edit(path, change):
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def test_every_difference_is_listed_before_anything_is_read(model, spec, tmp_path):
    def change(state):
        del state["model.layers.1.mlp.up_proj.weight"]
        del state["visual.merger.mlp.0.bias"]
        state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        state["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
        state["model.language_model.embed_tokens.weight"] = torch.zeros(96, 64)

    _edit(save_model(model, spec, tmp_path), change)
    with pytest.raises(ValueError, match="6 problems") as error:
        load_policy(tmp_path, Dtypes())
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: visual.merger.mlp.0.bias",
        "shape: model.layers.0.self_attn.q_proj.weight is (3, 4), expected (64, 64)",
        "unknown: model.layers.7.mlp.up_proj.weight",
        "dtype: model.norm.weight is I32",
        "twice: model.embed_tokens.weight",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_tied_checkpoint_may_repeat_its_embedding_as_head(tmp_path, offset):
    spec = Spec(seed=4, is_tied=True)
    path = save_model(random_model(spec), spec, tmp_path)

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + offset

    _edit(path, change)
    if offset == 0:
        load_policy(path, Dtypes())
    else:
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            load_policy(path, Dtypes())


def test_nested_config_style_of_transformers_5_is_read(model, spec, tmp_path):
    path = save_model(model, spec, tmp_path)
    reference = load_policy(path, Dtypes())
    model.config.save_pretrained(path)
    assert "text_config" in (path / "config.json").read_text()
    assert load_policy(path, Dtypes()).arch == reference.arch


def test_missing_files_are_named(model, spec, tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        load_policy("no/such/place/at/all", Dtypes())
    with pytest.raises(ValueError, match="hub failed"):  # tests are offline
        load_policy("nobody/no-such-model", Dtypes())
    path = save_model(model, spec, tmp_path, num_shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        load_policy(path, Dtypes())
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_policy(path, Dtypes())
    (path / "model.safetensors").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_policy(path, Dtypes())


def test_stored_dtype_is_cast_to_the_one_asked_for(model, spec, tmp_path):
    path = save_model(model, spec, tmp_path, dtype=torch.bfloat16)
    assert loading.checkpoint_dtype(path) == "bfloat16"
    kept = load_policy(path, Dtypes(param=jnp.bfloat16))
    wide = load_policy(path, Dtypes(param=jnp.float32))
    assert kept.text.embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        wide.text.embedding[...], kept.text.embedding[...].astype(jnp.float32)
    )


@pytest.mark.parametrize("stage_bytes", [DEVICE_FILL_BYTES, 4 * 2**20])
def test_parameters_land_in_the_shardings_asked_for(
    model, spec, tmp_path, monkeypatch, stage_bytes
):
    path = save_model(model, spec, tmp_path)
    reference = load_policy(path, Dtypes())
    monkeypatch.setattr(loading, "_STAGE_BYTES", stage_bytes)
    monkeypatch.setattr(loading, "_PIECE_BYTES", 5000)
    devices = jax.devices()[: 2 if len(jax.devices()) > 1 else 1]
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("tensor",), devices=devices, axis_types=auto)

    def place(leaf):
        split = leaf.ndim > 1 and leaf.shape[-1] % len(devices) == 0
        spec = [None] * (leaf.ndim - 1) + ["tensor" if split else None]
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(place, nnx.state(abstract_policy(reference.arch, Dtypes())))
    policy = load_policy(path, Dtypes(), shardings)
    assert _same(reference, policy)
    expected = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    assert policy.text.blocks.q_proj.kernel[...].sharding.is_equivalent_to(expected, 3)
