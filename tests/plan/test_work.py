"""Chips, shapes and the arithmetic of a plan; nothing is compiled."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from speciarl_jax.arch import Arch
from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.config.schema import Config, micro_batch_prompts
from speciarl_jax.plan.chips import CHIPS, parse_topology
from speciarl_jax.plan.exams import ExamRound, exam_rounds, exam_seconds
from speciarl_jax.plan.models import planned_arch
from speciarl_jax.plan.shapes import all_shapes, expected_lengths, plan_shapes
from speciarl_jax.plan.table import plan_text, scale_table
from speciarl_jax.plan.work import Layout, step_work

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SEVEN_B = "Qwen/Qwen2.5-VL-7B-Instruct"
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def recipe(**changes):
    config = Config()
    config.train.prompts_per_step = config.train.prompts_per_update = 8
    config.train.prompts_per_micro_batch = 2
    config.data.prompt_buckets = (128, 256)
    config.data.max_prompt_tokens = 256
    for path, value in changes.items():
        section, field = path.split("__")
        setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:8x8", ("v5e", "8x8", 64)),
        ("v5p:2x2x4", ("v5p", "2x2x4", 16)),
        ("gpu:h200x8", ("h200", "8", 8)),
        ("gpu:a10gx2", ("a10g", "2", 2)),
    ],
)
def test_topologies_are_parsed(name, expected):
    assert parse_topology(name) == expected


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "gpu:h200", "gpu:h200x16", "gpu:v5ex4", "8x8"])
def test_bad_topologies_are_named(name):
    with pytest.raises(ValueError, match=re.escape(f"--topology={name}: expected CHIP:SIZES")):
        parse_topology(name)


def test_every_chip_has_a_peak():
    assert {name: chip.peak for name, chip in CHIPS.items() if name.startswith("v")} == {
        "v4": 275e12,
        "v5e": 197e12,
        "v5p": 459e12,
        "v6e": 918e12,
    }
    assert all(chip.peak > 1e13 for chip in CHIPS.values())


@pytest.mark.parametrize(("size", "layers", "kv"), [("3B", 36, 2), ("7B", 28, 4), ("32B", 64, 8)])
def test_published_models_need_no_weights(size, layers, kv):
    text = planned_arch(f"Qwen/Qwen2.5-VL-{size}-Instruct").text
    assert (text.num_layers, text.num_kv_heads) == (layers, kv)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"model.path='Qwen/other'.*Qwen2.5-VL-72B"):
        planned_arch("Qwen/other")


def test_shapes_by_hand():
    arch = planned_arch(SEVEN_B)
    mesh = {"data": 2, "fsdp": 1, "tensor": 2}
    config = recipe(data__max_pixels=448 * 448, train__prompts_per_update=4)
    shapes = plan_shapes(config, arch, mesh, num_hosts=2)
    assert (shapes.prompt_tokens, shapes.host_prompts, shapes.wave_prompts) == (256, 4, 4)
    # 256 merged tokens: 16 x 16 is 4 x 4 windows; 13 x 19 needs 4 x 5, the next bucket.
    assert shapes.windows == 20
    assert (shapes.micro_prompts, shapes.num_micro, shapes.num_updates) == (4, 1, 2)


def test_packed_groups_are_planned_at_their_limit():
    tokens = 256 + 10 * 2048
    arch = planned_arch(SEVEN_B)
    shapes = plan_shapes(recipe(train__micro_batch_tokens=2 * tokens + 1), arch, ONE, 1)
    assert (shapes.micro_prompts, shapes.num_micro) == (2, 1)
    with pytest.raises(ValueError, match=f"one group may take {tokens} padded tokens"):
        plan_shapes(recipe(train__micro_batch_tokens=tokens - 1), arch, ONE, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__prompts_per_update": 7}, "prompts_per_update=7 is not a multiple of 2 replicas"),
        ({"algo__name": "sft"}, "recipes with rollouts only"),
    ],
)
def test_what_cannot_be_planned_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_shapes(recipe(**changes), planned_arch("tiny"), ONE | {"data": 2}, 1)


@pytest.mark.parametrize(("replicas", "micro", "count"), [(8, 8, 2), (32, 4, 1), (64, 2, 1)])
def test_a_large_mesh_gets_the_micro_batches_that_training_takes(replicas, micro, count):
    """The paper's 128 prompts an update, at most 8 at once: a replica's share is the limit."""
    config = recipe(train__prompts_per_step=256, train__prompts_per_update=128)
    config.train.prompts_per_micro_batch = 8
    config.validate()
    shapes = plan_shapes(config, planned_arch("tiny"), ONE | {"data": replicas}, replicas // 4)
    assert (shapes.micro_prompts, shapes.num_micro) == (micro * replicas, count)
    assert micro == micro_batch_prompts(config.train, replicas)


def test_all_buckets_lists_each_size_once():
    config = recipe(rollout__max_completion_tokens=128, rollout__chunk_tokens=64)
    shapes = plan_shapes(config, planned_arch("tiny"), ONE, 1)
    found = {(s.prompt_tokens, s.completion_tokens) for s in all_shapes(config, shapes)}
    assert found == {(256, 128), (256, 64), (128, 128), (128, 64)}


def test_expected_lengths_have_the_stated_median_and_tail():
    config = recipe(rollout__group_size=250)
    lengths = expected_lengths(plan_shapes(config, planned_arch("tiny"), ONE, 1))
    assert lengths.shape == (8, 250)
    assert np.median(lengths) == pytest.approx(120, abs=1)
    assert np.quantile(lengths, 0.95) == pytest.approx(600, rel=0.01)
    assert lengths.mean() == pytest.approx(193, rel=0.03)
    assert lengths.max() <= 2048


def work_of(config, layout, chip="v5e"):
    arch = planned_arch(SEVEN_B)
    mesh = {"data": layout.data, "fsdp": layout.fsdp, "tensor": layout.tensor}
    shapes = plan_shapes(config, arch, mesh, 1)
    return step_work(config, arch, shapes, layout, CHIPS[chip]), shapes


def test_roofline_by_hand():
    weights, adapter = 15_000_000_000, 160_000_000
    layout = Layout(1, 1, 1, weights, 1_000_000_000, 4 * adapter, adapter)
    work, shapes = work_of(recipe(train__prompts_per_update=4), layout)
    assert set(work) == {
        "encode",
        "prefill",
        "decode",
        "old log-probs",
        "reference log-probs",
        "update",
    }
    # 8 prompts of 256 tokens: two FLOPs a weight and token, adapter included, and attention.
    linear = 2 * (6_525_288_448 + adapter) * 8 * 256
    assert work["prefill"].model_flops == pytest.approx(linear, rel=0.02)
    assert work["prefill"].device_bytes == weights
    assert work["prefill"].seconds == pytest.approx(work["prefill"].model_flops / 197e12)
    # Decoding reads all weights once a step, as many steps as the longest answer has tokens.
    steps = int(expected_lengths(shapes).max())
    assert work["decode"].device_bytes > steps * weights
    assert work["decode"].seconds == pytest.approx(work["decode"].device_bytes / 819e9)
    assert all(one.wire_bytes == 0 for one in work.values())
    assert 0 < work["decode"].mfu_bound(CHIPS["v5e"], 1) < 0.1


def test_tensor_parallel_sums_by_hand():
    layout = Layout(1, 1, 4, 4_000_000_000, 1_000_000_000, 160_000_000, 160_000_000)
    work, _ = work_of(recipe(model__compute_dtype="bfloat16"), layout)
    # Two sums a layer of [tokens, width] in bfloat16; a ring of four sends 1.5 times the array.
    assert work["prefill"].wire_bytes == 1.5 * 2 * 28 * 8 * 256 * 3584 * 2


def test_recomputation_costs_time_but_no_model_flops():
    layout = Layout(1, 1, 1, 15_000_000_000, 1_000_000_000, 640_000_000, 160_000_000)
    none, _ = work_of(recipe(), layout)
    full, _ = work_of(recipe(model__remat="full"), layout)
    assert full["update"].model_flops == none["update"].model_flops
    assert full["update"].hardware_flops > 1.2 * none["update"].hardware_flops
    assert full["update"].mfu_bound(CHIPS["v5e"], 1) < none["update"].mfu_bound(CHIPS["v5e"], 1)


def test_table_says_what_does_not_fit():
    row = {
        "name": "update",
        "arguments_gib": 4.0,
        "temporaries_gib": 13.0,
        "others_gib": 0.0,
        "peak_gib": 17.0,
        "fits": False,
        "collectives": {"all-reduce": 3},
        "in_loop_mib": 12.0,
        "in_loop_kind": "all-reduce",
        "around_mib": 2240.0,
        "compile_s": 1.0,
    }
    shapes = plan_shapes(recipe(), planned_arch("tiny"), ONE, 1)
    totals = {
        "step_s": 10.0,
        "mfu_bound": 0.25,
        "num_steps": 165,
        "train_hours": 0.4,
        "eval_hours": 0.1,
        "hours": 0.5,
        "chip_hours": 32.0,
        "cost": 64.0,
        "price_per_chip_hour": 2.0,
        "judge_calls_per_step": 2560,
        "judge_calls_by_evaluations": 1_000,
        "judge_calls_per_run": 423_400,
        "judge_calls_per_s": 256.0,
    }
    plan = {
        "recipe": "r",
        "model": "m",
        "topology": "v5e:2x2",
        "num_devices": 4,
        "num_hosts": 1,
        "usable_gib": 15.7,
        "mesh": ONE,
        "remat": "full",
        "shapes": {**vars(shapes), "num_waves": shapes.num_waves},
        "programs": [row],
        "fits": False,
        "decoding": {
            "steps": 2048,
            "calls": 40,
            "step_ms": 2.5,
            "waves": 1,
            "parked": 0,
            "parked_at_worst": 3,
            "launches": 2072,
            "hops": 240,
            "is_compiled": True,
        },
        "totals": totals,
        "caveat": "",
    }
    text = plan_text(plan)
    assert "does NOT fit: update needs 17.00 of 15.70 usable GiB" in text
    assert "17.00 TOO LARGE" in text
    assert "AR 12.0 MiB |      2240 MiB" in text
    assert "2048 steps of 2.50 ms in 40 calls and 1 waves (the HLO of three sizes)" in text
    assert "0 halves of a batch wait on the host, 3 if every answer reaches its limit" in text
    assert "0.4 h for 165 steps and 0.1 h for evaluations: 0.5 h, 32 chip-hours" in text
    assert "2560 calls a step, 1000 for evaluations, 423400 in all" in text
    assert "cost: at least 64 at 2 per chip-hour" in text
    section = scale_table(plan).splitlines()
    assert section[0] == "### `r` on v5e:2x2"
    assert section[-1].startswith("- cost: at least 64")
    assert sum(line.startswith("|") for line in section) == 3


@pytest.mark.parametrize(
    ("name", "mesh", "hosts"),
    [
        ("qwen2_5_vl_7b_v5e", (16, 1, 4), 1),
        ("qwen2_5_vl_7b_v5p", (4, 1, 4), 1),
        ("qwen2_5_vl_7b_v6e", (4, 1, 4), 1),
        ("qwen2_5_vl_32b_v5p", (16, 1, 4), 1),
        ("qwen2_5_vl_72b_v5p", (8, 1, 8), 1),
        ("qwen2_5_vl_3b_gpu_smoke", (1, 1, 1), 1),
    ],
)
def test_recipes_lie_on_the_slices_their_headers_name(name, mesh, hosts):
    config, _ = load_recipe(str(CONFIGS / f"{name}.py"), [])
    config.validate()
    arch = planned_arch(config.model.path)
    assert isinstance(arch, Arch)
    assert arch.text.num_kv_heads % mesh[2] == 0
    shapes = plan_shapes(config, arch, dict(zip(ONE, mesh, strict=True)), hosts)
    assert shapes.num_waves == 1  # of expected lengths, the slice sampling as one
    assert (config.mesh.fsdp, config.mesh.tensor) == mesh[1:]


# --- evaluations --------------------------------------------------------------------------------


def test_the_evaluations_of_the_papers_run_by_hand():
    """Before and after on six official test sets; 100 pictures of each every 20 of 165 steps."""
    config, _ = load_recipe(str(CONFIGS / "qwen2_5_vl_7b_cub.py"), [])
    config.validate()
    tests, validations = exam_rounds(config)
    assert tests == ExamRound(2, (5794, 6149, 25_250, 3669, 8041, 3333), 1)
    assert validations == ExamRound(10, (100,) * 6, 1)  # before step one, 8 on the way, the last
    training = config.train.num_steps * config.generation_prompts * config.rollout.group_size
    assert tests.answers + validations.answers == 110_472 < training / 3


def test_every_kind_of_scoring_is_counted():
    spec = "field_guide_birds:train=50,validation=30,test=20"
    config = recipe(
        data__eval_sources=(spec,), data__num_eval=12, data__num_validation=7, eval__best_of=5,
        eval__policy_samples=2, eval__score_trained=False, train__num_steps=7, train__eval_every=3,
    )  # fmt: skip
    found = exam_rounds(config)
    assert found == [
        ExamRound(1, (12,), 1), ExamRound(1, (12,), 2), ExamRound(1, (12,), 5),
        ExamRound(4, (7,), 1), ExamRound(4, (7,), 2),
    ]  # fmt: skip
    config.train.eval_every = config.eval.best_of = 0
    config.eval.score_base = False
    assert exam_rounds(config) == []
    config.eval.score_base, config.data.num_eval = True, 0
    assert exam_rounds(config)[0].pictures == (20,)
    config.data.eval_sources = ("moon",)
    with pytest.raises(ValueError, match="'moon' is unknown"):
        exam_rounds(config)


def test_seconds_of_evaluations_are_those_of_their_batches():
    """Two batches take twice as long as one; a second scoring as long as the first."""
    layout = Layout(1, 1, 1, 15_000_000_000, 1_000_000_000, 0, 0)
    config, arch = recipe(), planned_arch(SEVEN_B)
    shapes = plan_shapes(config, arch, ONE, 1)

    def seconds(*rounds):
        return exam_seconds(config, list(rounds), arch, shapes, layout, CHIPS["v5e"])

    once = seconds(ExamRound(1, (64,), 1))
    weights_s = 15e9 / 819e9
    longest = int(expected_lengths(dataclasses.replace(shapes, num_prompts=64, group_size=1)).max())
    assert longest * weights_s < once < 1.3 * longest * weights_s  # decoding reads the weights
    assert seconds(ExamRound(1, (65,), 1)) == pytest.approx(2 * once)
    assert seconds(ExamRound(3, (64, 64), 1)) == pytest.approx(6 * once)
    assert seconds() == 0
