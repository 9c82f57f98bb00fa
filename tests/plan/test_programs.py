"""Programs compiled from shapes alone: on fake devices here, for TPU with libtpu (tpu_aot)."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from speciarl_jax.cli.main import main
from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.plan import gpu, hlo
from speciarl_jax.plan.chips import open_topology, worker_environment
from speciarl_jax.plan.make import open_plan
from speciarl_jax.plan.measure import measure
from speciarl_jax.plan.programs import (
    Program,
    decode_program,
    decode_programs,
    device_bytes,
    encode_program,
    learning_programs,
    step_programs,
)
from speciarl_jax.plan.search import search

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "cpu_smoke.py:updates=1")
SMALL = [
    "--config.mesh.tensor=2",
    "--config.train.prompts_per_micro_batch=4",
    "--config.rollout.compact=true",
]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


@pytest.fixture(scope="module")
def planned():
    config, _ = load_recipe(SMOKE, SMALL)
    return open_plan(config, open_topology("gpu:l4x8"))


def test_programs_of_a_step_in_order(planned):
    names = [program.name for program in step_programs(planned.session, planned.shapes)]
    expected = ["encode", "prefill", "decode", "shrink", "reference log-probs", "update"]
    assert names == expected


def test_log_probs_that_a_recipe_does_not_need_are_left_out():
    topology = open_topology("gpu:l4x8")
    for overrides, expected in (
        (["--config.algo.kl_coef=0.0"], ["update"]),
        (
            ["--config.train.prompts_per_update=8"],
            ["old log-probs", "reference log-probs", "update"],
        ),
    ):
        smaller = ["--config.train.prompts_per_micro_batch=1", *overrides]
        config, _ = load_recipe(SMOKE, smaller)
        one = open_plan(config, topology)
        programs = learning_programs(one.session, one.shapes)
        assert [program.name for program in programs] == expected


def test_layout_counts_the_bytes_of_a_device(planned):
    session = planned.session
    layout, frozen = planned.layout, session.parts.frozen

    def whole(tree):
        return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert layout.vision_bytes == whole(frozen["visual"])
    text = layout.text_bytes - layout.adapter_bytes
    assert text == pytest.approx(whole(frozen["text"]) / 2, rel=0.01)  # norms stay whole
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(session.parts.trainable))
    assert layout.adapter_params == count


def test_xla_counts_the_same_arguments(planned):
    program = encode_program(planned.session, planned.shapes)
    measured = measure(program)
    _, (trainable, frozen), *images, _ = program.args
    # XLA drops arguments that the program does not read: all but the tower and its images. They
    # are on the device all the same.
    assert measured.arguments == device_bytes((frozen["visual"], images))
    unused = device_bytes((trainable, frozen["text"]))
    assert measured.others == device_bytes(planned.session.optim) + unused
    assert measured.peak == measured.arguments + measured.temporaries + measured.others


def test_the_head_is_gathered_by_nobody(planned):
    """With `tensor` above 1 each device makes its part of the scores; these change hands."""
    vocabulary = planned.session.arch.text.vocab_size
    head = vocabulary * planned.session.arch.text.hidden_size * 4
    program = decode_program(planned.session, planned.shapes)
    calls = hlo.collectives(hlo.parse(program.lower().compile().as_text()))
    rows = planned.shapes.wave_shard_prompts * planned.shapes.group_size
    assert max(one.num_bytes for one in calls) <= rows * vocabulary * 4 // 2 < head
    assert sum(one.kind == "all-to-all" for one in calls) == 1


def test_shrinking_needs_the_old_and_the_new_cache(planned):
    decode, shrink = decode_programs(planned.session, planned.shapes)
    state = next(arg for arg in decode.args if hasattr(arg, "own"))
    measured = measure(shrink)
    own = device_bytes(state.own)
    assert 0.7 * own < measured.temporaries < 1.2 * own  # 30 of 40 rows, and small arrays
    assert measured.traffic.collectives == {}


@pytest.mark.slow
def test_the_run_calls_what_is_planned(tmp_path):
    """Shapes and types of a real first wave, against the plan's on one device."""
    from speciarl_jax.rollout.sampling import training_sampling
    from speciarl_jax.run.opening import open_train_loader
    from speciarl_jax.run.session import open_session

    config, folder = load_recipe(SMOKE, ["--config.mesh.data=1"])
    config.data.data_dir, config.data.num_train = str(tmp_path), 16
    session = open_session(config, folder)
    loader = open_train_loader(session)
    batch = next(iter(loader))
    loader.close()
    states = session.sampling_states(session.parts.trainable)
    table = session.encode(states, batch)
    group = config.rollout.group_size
    sampling = training_sampling(config)
    (prompts,) = session.engine.plan_waves(states, batch, len(table), group, sampling)
    wave = session.engine.start(states, prompts, table, group, 0, 1)

    plan = open_plan(config, open_topology("gpu:l4x1"))
    decode = decode_programs(plan.session, plan.shapes)[0]

    def signature(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    _, planned_states, planned_cache, planned_rows, planned_state, *_ = decode.args
    assert signature(states) == signature(planned_states)
    assert signature(wave.cache) == signature(planned_cache)
    assert signature(wave.rows.row_map(prompts.num_prompts, group)) == signature(planned_rows)
    assert signature(wave.state) == signature(planned_state)


@pytest.mark.slow
def test_the_verb_plans_in_a_process_of_its_own(capfd):
    words = ["plan", f"--config={SMOKE}", "--topology=gpu:l4x2", "--json", "--price=1.5"]
    assert main([*words, "--config.train.prompts_per_micro_batch=8"]) == 0
    out, err = capfd.readouterr()
    plan = json.loads(out)
    assert plan["fits"]
    assert plan["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert plan["caveat"] == (gpu.NO_TUNING if gpu.has_compiler() else gpu.NO_PLUGIN)
    totals = plan["totals"]
    # 240 test pictures of four domains: greedy and 2 samples, twice, and 10 of the best-of-10; 40
    # of each validate before step one and after every fifth.
    scored = 4 * 240 * (2 * 3 + 10) + 4 * 40 * 31 * 3
    assert totals["judge_calls_by_evaluations"] == scored
    assert totals["judge_calls_per_run"] == 16 * 10 * 150 + scored
    assert totals["eval_hours"] > 0
    assert totals["hours"] == pytest.approx(totals["train_hours"] + totals["eval_hours"])
    assert totals["cost"] == pytest.approx(totals["hours"] * 2 * 1.5)
    assert "plan: update:" in err


@pytest.mark.slow
def test_a_time_limit_ends_the_process(capfd):
    words = ["plan", f"--config={SMOKE}", "--topology=gpu:l4x1", "--limit_s=0.5"]
    assert main(words) == 1
    assert "no result within --limit_s=0.5" in capfd.readouterr().err


def test_bad_requests_are_one_line(capfd):
    assert main(["plan", f"--config={SMOKE}", "--topology=v9:2x2"]) == 2
    assert "--topology=v9:2x2: expected CHIP:SIZES" in capfd.readouterr().err


@pytest.mark.slow
def test_search_takes_the_largest_micro_batch_that_fits():
    config, _ = load_recipe(SMOKE, ["--config.train.prompts_per_step=2"])
    config.train.prompts_per_update, config.model.remat = 2, "full"
    found = search(config, open_topology("gpu:l4x1"))
    assert (found.config.model.remat, found.config.train.prompts_per_micro_batch) == ("none", 2)
    assert "--config.mesh.tensor=1 --config.model.remat=none" in found.flags
    assert 0 < found.config.rollout.max_cache_mb < 22 * 1024


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.",
            17.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (198.20G) exceeds available HBM (95.74G).",
            199.2,
        ),
    ],
)
def test_what_xla_says_of_a_program_that_is_too_large(message, gib):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = jax.ShapeDtypeStruct((2**28,), np.float32, sharding=place)  # 1 GiB
    found = measure(Program("update", Refused(message), (len, weights)))
    assert found.is_too_large
    assert found.arguments == 2**30
    assert found.peak == int(gib * 2**30)
    with pytest.raises(ValueError, match="XLA refuses a program: INTERNAL: core halted"):
        measure(Program("update", Refused("INTERNAL: core halted"), (len, weights)))


def test_a_program_that_jaxlib_cannot_read_is_one_line():
    compiled = jax.jit(lambda x: x).lower(1.0).compile()
    with pytest.raises(ValueError, match=r"cannot read what libtpu compiled \(INTERNAL: RET_CHECK"):
        measure(Program("update", Unreadable(compiled), (1.0,)))


class Unreadable(jax.stages.Lowered):
    """A jitted function whose HLO is of another version."""

    def __init__(self, compiled):
        self.compiled = compiled

    def memory_analysis(self):
        return self.compiled.memory_analysis()

    def lower(self, *args):
        return self

    def compile(self):
        return self

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")


class Refused(jax.stages.Lowered):
    """A jitted function that the compiler does not take."""

    def __init__(self, message):
        self.message = message

    def lower(self, *args):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_search_says_that_nothing_fits():
    topology = open_topology("gpu:l4x1")
    chip = dataclasses.replace(topology.chip, memory_gib=0.001)
    config, _ = load_recipe(SMOKE, [])
    with pytest.raises(ValueError, match="--search: tiny does not fit gpu:l4x1"):
        search(config, dataclasses.replace(topology, chip=chip))


@pytest.mark.parametrize("early_exit", [True, False])
def test_decoding_without_early_exit_needs_no_collective(early_exit):
    config, _ = load_recipe(SMOKE, [])
    config.mesh.data, config.train.prompts_per_micro_batch = 2, 8
    config.rollout.early_exit, config.rollout.compact = early_exit, True
    planned = open_plan(config, open_topology("gpu:l4x2"))
    found = {}
    for program in decode_programs(planned.session, planned.shapes):
        text = program.lower().compile().as_text()
        found[program.name] = re.findall(
            r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", text
        )
    assert found == {"decode": ["all-reduce"] * early_exit, "shrink": []}


DECODE = """
import json, sys
from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.plan.chips import open_topology, worker_environment
from speciarl_jax.plan.make import open_plan
from speciarl_jax.plan.measure import measure
from speciarl_jax.plan.programs import decode_program, largest_size

config, _ = load_recipe(sys.argv[1], [])
planned = open_plan(config, open_topology(sys.argv[2]))
size = largest_size(planned.session, planned.shapes)
found = measure(decode_program(planned.session, planned.shapes, *size))
print(json.dumps([found.temporaries, found.traffic.in_loop[0], found.traffic.around]))
"""


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install 'speciarl-jax[plan]'")
@pytest.mark.parametrize(
    ("recipe", "topology"), [("qwen2_5_vl_7b_v5e", "v5e:8x8"), ("qwen2_5_vl_7b_v6e", "v6e:4x4")]
)
def test_decoding_on_a_pod_gathers_no_head_and_copies_no_cache(recipe, topology):
    """The whole slice samples as one, `tensor` 4; the head would be 1,040 MiB in every step."""
    config = str(ROOT / "configs" / f"{recipe}.py")
    result = subprocess.run(
        [sys.executable, "-c", DECODE, config, topology],
        cwd=ROOT, env=worker_environment(topology), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    temporaries, in_loop, around = json.loads(result.stdout.splitlines()[-1])
    assert temporaries <= 1.1 * 2**30
    assert in_loop <= 100 * 2**20
    assert around <= 100 * 2**20  # the adapter in bfloat16; a cache would be gigabytes


@pytest.mark.tpu_aot
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install 'speciarl-jax[plan]'")
def test_the_small_policy_compiles_for_tpu():
    words = ["plan", f"--config={SMOKE}", "--topology=v5e:2x2", "--json", *SMALL]
    result = subprocess.run(
        [sys.executable, "-m", "speciarl_jax.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"]
    assert plan["caveat"] == ""
    rows = {row["name"]: row for row in plan["programs"]}
    assert rows["update"]["collectives"]["all-reduce"] > 0
    assert all(row["peak_gib"] < 1 for row in rows.values())
