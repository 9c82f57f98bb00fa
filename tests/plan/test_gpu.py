"""GPUs that are not there: what XLA is told of them, and what is read out of its program."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.plan import chips, gpu, hlo, traffic
from speciarl_jax.plan.make import open_plan
from speciarl_jax.policy.flash import attend_cudnn

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "cpu_smoke.py:updates=1")
needs_plugin = pytest.mark.skipif(
    not gpu.has_compiler(), reason="needs jax's CUDA plugin: pip install 'speciarl-jax[plan-gpu]'"
)

# Two layers: a slice of stacked weights is copied, multiplied, and one column of a cache written.
# In bytes: weights 2 x 64, cache 192 of which a column is 16, head 160, logits 4 x 10 x 4.
HLO = pathlib.Path(__file__).with_name("decode_step.hlo").read_text()


def test_bytes_of_a_step_worked_by_hand():
    step = traffic.decode_traffic(hlo.parse(HLO), (10, 10))
    hidden, layer, column, logits, head = 64, 64, 16, 160, 160
    assert step.moved == {
        "weights": 2 * layer + head,  # each layer is sliced once
        "caches": 2 * column,
        "logits": logits + logits,
        "copies": 2 * (layer + layer),  # written, and read by the product
        # Of each layer: hidden in and out of the product, a column of it and three indices read;
        # and of the step the hidden states that go into the logits and come out of the sampler.
        "rest": 2 * (hidden + hidden + column + 4 + 4) + hidden + hidden,
    }
    assert step.launches == 2 + 2 * 3
    assert step.needed == {"weights": 128 + head, "caches": 192, "logits": 2 * logits}


def test_an_embedding_beside_a_head_is_read_by_rows():
    untied = HLO.replace("'blocks\\'].value", "'lm_head\\'].value")
    assert untied != HLO
    assert traffic.decode_traffic(hlo.parse(untied), (10, 10)).needed["weights"] == 128


def test_bytes_of_the_arguments_that_a_program_takes():
    assert traffic.entry_bytes(hlo.parse(HLO)) == 128 + 192 + 64 + 160


def test_a_program_without_a_loop_of_unknown_length_is_refused():
    known = HLO.replace("body=%step", 'body=%step, backend_config={"known_trip_count":{"n":"2"}}')
    with pytest.raises(ValueError, match="one loop of unknown length; found 0"):
        traffic.decode_traffic(hlo.parse(known), (10, 10))


def test_every_card_has_a_target_with_its_own_numbers():
    texts = {}
    for name in gpu.TARGETS:
        chip = chips.CHIPS[name]
        texts[name] = gpu.target_text(name, chip.kind, 2**34, chip.hbm_gb_s * 1e9)
        assert chip.peak > 0
        assert f'name: "{chip.kind}"' in texts[name]
    assert len(set(texts.values())) == 8
    assert "memory_bandwidth: 3350000000000 device_memory_size: 17179869184" in texts["h100"]
    assert "shared_memory_per_block_optin: 101376" in texts["l4"]
    assert "ACCELERATED_FEATURES" in texts["h100"]
    assert "feature_extension: NONE" in texts["a100"]


def test_without_the_plugin_the_plan_is_of_the_cpu_s_compiler_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "PLUGINS", ("no_such_plugin",))
    topology = chips.open_topology("gpu:l40sx2")
    assert topology.devices[0].platform == "cpu"
    assert "planned from XLA for CPU" in topology.caveat
    assert "speciarl-jax[plan-gpu]" in topology.caveat
    assert "xla_disable_hlo_passes" in chips.worker_environment("gpu:l40sx2")["XLA_FLAGS"]
    monkeypatch.setattr(gpu, "PLUGINS", ("json",))  # any module that is there
    assert "xla_disable_hlo_passes" not in chips.worker_environment("gpu:l40sx2")["XLA_FLAGS"]


@pytest.mark.parametrize("train_vision", [False, True])
def test_all_parameters_can_be_planned(train_vision):
    """Nothing of the language model is frozen then, and perhaps nothing at all."""
    config, _ = load_recipe(SMOKE, ["--config.model.train_base=true", "--config.algo.kl_coef=0.0"])
    config.model.train_vision = train_vision
    layout = open_plan(config, chips.open_topology("gpu:l4x1")).layout
    text, vision = 2695680, 2731904  # float32 bytes of the small policy
    assert (layout.text_bytes, layout.vision_bytes) == (text, vision)
    assert layout.adapter_bytes == text + vision * train_vision
    assert layout.adapter_params == 0


def plan(*words):
    result = subprocess.run(
        [sys.executable, "-m", "speciarl_jax.cli", "plan", "--json", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.gpu_aot
@needs_plugin
def test_the_small_policy_compiles_for_gpus_that_share_its_heads():
    found = plan(
        f"--config={SMOKE}",
        "--topology=gpu:h100x4",
        "--config.mesh.tensor=2",
        "--config.train.prompts_per_micro_batch=4",
        "--config.model.compute_dtype=bfloat16",
    )
    assert found["fits"]
    assert found["caveat"] == gpu.NO_TUNING
    rows = {row["name"]: row for row in found["programs"]}
    assert rows["update"]["collectives"]["all-reduce"] > 0
    step = rows["decode"]["step"]
    assert step["launches"] > 50
    # A scan over stacked layers copies every slice of them; what must move is less.
    assert step["moved"]["copies"] > 0
    assert sum(step["needed"].values()) < sum(step["moved"].values())
    assert "step" not in rows["update"]


@pytest.mark.gpu_aot
@needs_plugin
@pytest.mark.parametrize("name", list(gpu.TARGETS))
def test_every_card_compiles_fused_attention(name):
    (card,) = chips.open_topology(f"gpu:{name}x1").devices
    place = jax.sharding.SingleDeviceSharding(card)
    q = jax.ShapeDtypeStruct((2, 64, 4, 128), jnp.bfloat16, sharding=place)
    sees = jax.ShapeDtypeStruct((2, 64), bool, sharding=place)
    attend = jax.jit(lambda q, sees: attend_cudnn(q, q, q, sees, offset=0))
    assert "__cudnn$fmha" in attend.lower(q, sees).compile().as_text()
