"""The published sizes from their config.json shapes, without allocating them."""

import jax
import pytest
from flax import nnx

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.policy.layers import Dtypes, LoRAParam
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, abstract_policy, count_parameters, split_policy

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
# name: hidden, intermediate, layers, heads, kv heads, vocabulary, tied, vision intermediate,
# parameters (billions, as the hub counts them)
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3.75),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8.29),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33.45),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73.41),
}


def published(name, *, is_nested=False):
    hidden, inner, layers, heads, kv, vocabulary, tied, vision_inner, _ = SIZES[name]
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }
    if is_nested:
        text["rope_parameters"] = {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    else:
        text |= {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        }
    vision = VISION | {"out_hidden_size": hidden, "intermediate_size": vision_inner}
    config = {"model_type": "qwen2_5_vl", "vision_config": vision}
    return config | ({"text_config": text} if is_nested else text)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_published_sizes(name):
    arch = Arch.from_hf(published(name))
    assert arch == Arch.from_hf(published(name, is_nested=True))
    policy = abstract_policy(arch, Dtypes("bfloat16", "bfloat16"))
    billions = count_parameters(nnx.state(policy)) / 1e9
    assert billions == pytest.approx(SIZES[name][-1], abs=0.01)


def test_lora_of_the_paper_has_its_published_number_of_parameters():
    arch = Arch.from_hf(published("7B"))

    def make():
        policy = Policy(arch, dtypes=Dtypes("bfloat16", "bfloat16"), rngs=nnx.Rngs(0))
        add_lora(policy, LoraConfig(), 0)
        return policy

    policy = nnx.eval_shape(make)
    adapter = nnx.state(policy, LoRAParam)
    assert count_parameters(adapter) / 1e6 == pytest.approx(161.5, abs=0.05)  # method.md section 2
    assert all(path[0] == "text" for path, _ in nnx.to_flat_state(adapter))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jax.numpy.dtype("float32")}
    parts = split_policy(policy)
    assert count_parameters(parts.trainable) == count_parameters(adapter)
