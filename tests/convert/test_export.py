"""Out again: Hugging Face round trips, PEFT both ways, merged adapters."""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from speciarl_jax.cli import convert
from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.convert.adapter import adapted_layers, load_peft, save_peft
from speciarl_jax.convert.export import save_hf
from speciarl_jax.convert.loading import load_policy
from speciarl_jax.convert.parity.table import max_rel_error
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import split_policy
from tests.support.hf_reference import Spec, random_model, save_model

# peft asks transformers for a property that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SPEC = Spec(seed=21)
LORA = LoraConfig(rank=4, alpha=8.0)
TOLERANCE = 2e-5
TOKENS = np.random.default_rng(5).integers(1, 80, (1, 24), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(SPEC)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return save_model(model, SPEC, tmp_path_factory.mktemp("source"))


def run(*argv):
    parser = argparse.ArgumentParser()
    convert.register(parser.add_subparsers())
    args = parser.parse_args([str(part) for part in argv])
    return args.handler(args)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, state, tokens):
    policy = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (1, 3, tokens.shape[1]))
    lengths = jnp.array([tokens.shape[1]])
    return policy.text.logits(policy.hidden_states(tokens, positions, lengths))


def our_logits(policy):
    graphdef, state = nnx.split(policy)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_forward(graphdef, state, TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()


def adapted(source, lora=LORA):
    """A policy with an adapter that changes the answer."""
    policy = load_policy(source, Dtypes())
    add_lora(policy, lora, seed=1)
    for index, (_, layer) in enumerate(adapted_layers(policy)):
        noise = np.random.default_rng(index).normal(size=layer.lora_b.shape)
        layer.lora_b[...] = (0.05 * noise).astype(np.float32)
    return policy


@pytest.fixture(scope="module")
def policy(source):
    """With the default adapter; tests do not change it."""
    return adapted(source)


def all_tensors(path):
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_bit_equal(left, right):
    a, b = all_tensors(left), all_tensors(right)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_tied", [False, True])
def test_hf_to_orbax_to_hf_is_bit_equal(tmp_path, is_tied, dtype):
    spec = Spec(seed=22, is_tied=is_tied)
    source = save_model(
        random_model(spec), spec, tmp_path / "hf", dtype=dtype, is_hub_layout=is_tied, num_shards=2
    )
    assert run("convert", source, tmp_path / "orbax") == 0
    assert run("export", tmp_path / "orbax", tmp_path / "back", "--to=hf") == 0
    if is_tied:  # a converted directory spells keys as the hub does
        assert_bit_equal(source, tmp_path / "back")
    else:
        a, b = all_tensors(source), all_tensors(tmp_path / "back")
        assert len(a) == len(b)
        assert all(torch.equal(value, b[_hub(key)]) for key, value in a.items())
    assert (tmp_path / "back" / "generation_config.json").is_file()


def _hub(key):
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


@pytest.mark.parametrize("is_hub_layout", [True, False])
def test_shards_keep_keys_and_bits_and_transformers_loads_them(model, tmp_path, is_hub_layout):
    source = save_model(model, SPEC, tmp_path / "hf", is_hub_layout=is_hub_layout)
    out = tmp_path / "out"
    save_hf(load_policy(source, Dtypes()), source, out, "float32", max_shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert_bit_equal(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == all_tensors(source).keys()
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    np.testing.assert_array_equal(torch_logits(again), torch_logits(model))


def test_config_names_the_dtype_that_was_written(source, tmp_path):
    save_hf(load_policy(source, Dtypes()), source, tmp_path, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(value.dtype == torch.bfloat16 for value in all_tensors(tmp_path).values())
    with pytest.raises(ValueError, match="already holds a model"):
        save_hf(load_policy(source, Dtypes()), source, tmp_path, "bfloat16")


def test_peft_loads_our_adapter_with_equal_logits(policy, source, model, tmp_path):
    save_peft(split_policy(policy), LORA, str(source), tmp_path)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    names = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert len(names) == 7 * SPEC.num_layers
    assert not any("visual" in name for name in names)
    reference = torch_logits(theirs)
    assert max_rel_error(our_logits(policy), reference) <= TOLERANCE
    assert max_rel_error(torch_logits(model), reference) > 0.01  # the adapter matters


def test_reference_is_the_policy_without_adapter_on_the_same_arrays(policy, source):
    parts = split_policy(policy)
    plain = nnx.merge(parts.reference_graphdef, parts.frozen)
    assert plain.text.embedding[...] is policy.text.embedding[...]
    expected = our_logits(load_policy(source, Dtypes()))
    np.testing.assert_array_equal(our_logits(plain), expected)


def test_we_load_an_adapter_that_peft_wrote(source, model, tmp_path):
    base = random_model(SPEC)
    targets = r".*language_model\.layers\.\d+\.(self_attn\.[qo]_proj|mlp\.up_proj)"
    theirs = get_peft_model(base, PeftConfig(r=3, lora_alpha=12, target_modules=targets)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_B" in name:
                param.copy_(0.05 * torch.randn_like(param))
    theirs.save_pretrained(tmp_path)
    policy = load_policy(source, Dtypes())
    config = load_peft(tmp_path, policy)
    assert (config.rank, config.alpha) == (3, 12.0)
    assert [name for name, _ in adapted_layers(policy)] == [
        "text/blocks/mlp/up_proj",
        "text/blocks/o_proj",
        "text/blocks/q_proj",
    ]
    assert max_rel_error(our_logits(policy), torch_logits(theirs)) <= TOLERANCE


def test_merged_export_equals_the_adapted_policy(policy, source, tmp_path):
    save_hf(policy, source, tmp_path / "merged", "float32")
    save_hf(policy, source, tmp_path / "base", "float32", merge_adapter=False)
    merged = load_policy(tmp_path / "merged", Dtypes())
    assert max_rel_error(our_logits(merged), our_logits(policy)) <= TOLERANCE
    assert_bit_equal(source, tmp_path / "base")


def test_adapter_on_vision_by_expression_survives_the_round_trip(source, tmp_path):
    targets = r"^(visual/blocks/(qkv|mlp/up_proj)|visual/merger/mlp_0|text/lm_head)$"
    lora = LoraConfig(rank=2, alpha=2.0, targets=targets)
    policy = adapted(source, lora)
    save_peft(policy, lora, "base", tmp_path)
    other = load_policy(source, Dtypes())
    load_peft(tmp_path, other)
    pairs = zip(adapted_layers(policy), adapted_layers(other), strict=True)
    for (name, one), (again, two) in pairs:
        assert name == again
        np.testing.assert_array_equal(one.lora_a[...], two.lora_a[...])
        np.testing.assert_array_equal(one.lora_b[...], two.lora_b[...])


def test_default_targets_are_the_seven_language_projections(policy):
    names = {name.removeprefix("text/blocks/") for name, _ in adapted_layers(policy)}
    assert names == {
        *(f"{letter}_proj" for letter in "qkvo"),
        *(f"mlp/{name}_proj" for name in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("use_rslora", True), ("bias", "all"), ("rank_pattern", {"q": 2})],
)
def test_adapters_of_other_kinds_are_refused(policy, source, tmp_path, field, value):
    save_peft(policy, LORA, "base", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=field):
        load_peft(tmp_path, load_policy(source, Dtypes()))


def test_adapter_tensors_that_do_not_fit_are_listed(policy, source, tmp_path):
    save_peft(policy, LORA, "base", tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    layers = "base_model.model.model.language_model.layers"
    del state[f"{layers}.1.mlp.up_proj.lora_A.weight"]
    state[f"{layers}.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(5, 4)
    state[f"{layers}.9.self_attn.q_proj.lora_B.weight"] = torch.zeros(64, 4)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_peft(tmp_path, load_policy(source, Dtypes()))
    for text in ("layers.1.mlp.up_proj.lora_A", "(5, 4), expected (64, 4)", "layers.9"):
        assert text in str(error.value)


def test_export_says_what_is_missing(policy, source, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_peft(load_policy(source, Dtypes()), LORA, "base", tmp_path)
    with pytest.raises(ValueError, match="rank 4"):
        save_peft(policy, LoraConfig(rank=8, alpha=8.0), "base", tmp_path)
    with pytest.raises(ValueError, match="neither a directory that"):
        run("export", source, tmp_path, "--to=hf")
