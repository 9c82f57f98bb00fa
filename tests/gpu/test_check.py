"""The check of a real card, and what is packed for a machine without a network."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.gpu import check, pack, sections


def test_bounds_and_failures_are_faults():
    found = {
        "sampler": {"outside_top_p": 0.0, "logprob_error": 2e-4, "wall_s": 1.0},
        "decode": {"peak_over_plan": 1.05},
        "update": {"error": "exit code 1: out of memory; see update.log"},
        "smoke": {},
    }
    assert check.out_of_bounds(found) == [
        "sampler/logprob_error=0.0002: expected 0 to 0.0001",
        "update: exit code 1: out of memory; see update.log",
        "smoke: no time was left; run it by itself with --only smoke",
    ]
    assert check.out_of_bounds({"decode": {"peak_over_plan": 1.2}}) != []


def test_every_section_has_a_limit_and_all_fit_the_budget_in_turn():
    assert list(check.SECTIONS) == list(sections.SECTIONS)
    assert {path.partition("/")[0] for path in check.BOUNDS} <= set(check.SECTIONS)
    assert check.BUDGET_S < 600


def test_a_section_that_dies_costs_one_section(tmp_path):
    figures = check.run_section("no_such", 60.0, tmp_path, True)
    assert "exit code 1: KeyError: 'no_such'; see" in figures["error"]
    late = check.run_section("device", 0.2, tmp_path, True)
    assert late["error"].startswith("no end within 0 s")


def test_two_runs_differ_by_their_largest_gap():
    whole = [{"mismatch/logprob_mean_abs": 0.1, "policy/kl": 1.0}, {"eval/hm": 0.5}]
    halves = [{"mismatch/logprob_mean_abs": 0.1, "policy/kl": 1.25}, {"eval/hm": 0.9}]
    assert sections.largest_difference(whole, halves) == 0.25
    assert sections.largest_difference(whole, halves[:1]) == float("inf")


def test_what_is_packed_is_what_is_not_there():
    packages = [
        {"name": "jax", "version": "1", "requires_dist": ["numpy>=2", "tpu; extra == 'tpu'"]},
        {"name": "numpy", "version": "2", "requires_dist": []},
        {"name": "tpu", "version": "3"},
        {"name": "Tensor_Board.X", "version": "4", "requires_dist": ["numpy", "six"]},
        {"name": "six", "version": "5"},
    ]
    assert pack.missing(packages, ["JAX"]) == {"tpu": "3", "tensor-board-x": "4", "six": "5"}


def run_check(out, env, *words):
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu.check", f"--out={out}", *words],
        capture_output=True,
        text=True,
        env=env,
        cwd=check.ROOT,
        check=False,
    )


@pytest.mark.slow
def test_the_check_runs_in_miniature(tmp_path):
    """Programs of the plan with arrays, the sampler, and two steps in bfloat16 at even lengths."""
    rooms = ["attention", "sampler", "decode", "update", "smoke"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = run_check(tmp_path, env, "--tiny", "--only", *rooms)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["faults"] == []
    assert list(found["sections"]) == rooms
    assert found["sections"]["decode"]["tokens_per_s"] > 0
    assert found["sections"]["update"]["mfu"] > 0
    assert found["sections"]["smoke"]["steps"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_a_real_card_does_what_the_plan_says(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = run_check(tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sections"]["device"]["platform"] == "gpu"
