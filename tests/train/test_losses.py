"""Errors in the middle of a step: the state before it is saved, one line says what to do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.cli import main
from speciarl_jax.errors import JudgeError, TrainingStopped
from speciarl_jax.run import out_of_memory
from tests.support.training import rows

RECIPE = """
from tests.support.training import QUIET, small_config

def get_config(arg=None):
    changes = {"train__num_steps": 2, "train__save_every": 100, "algo__reward": REWARD}
    return small_config(**changes, **QUIET)

REWARD = "tests.train.test_losses.reward"
"""
HUGE = 1 << 44  # floats: more than any machine has, refused at once
FAULTS = {
    "device": lambda: jnp.zeros(HUGE, jnp.float32).block_until_ready(),
    "host": lambda: np.zeros(HUGE << 8),
    "judge": lambda: _raise(JudgeError("judge cache: database is locked; stop who holds it")),
    "stopped": lambda: _raise(TrainingStopped("step 2: too few labels; wait, then --resume")),
}
asked = {"faults": []}


def _raise(error):
    raise error


def reward(codes):
    """A user's own reward, which meets a fault in step 2."""
    if asked["faults"]:
        fault = asked["faults"].pop()
        if fault:
            FAULTS[fault]()
    return (codes >= 3).astype(np.float64)


@pytest.mark.slow
def test_a_fault_within_a_step_costs_that_step_at_most(tmp_path, capsys):
    recipe, workdir = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    command = ["train", f"--config={recipe}", f"--workdir={workdir}"]
    told = {}
    for fault in FAULTS:
        # Called by the preflight, by step 1 unless it is done, by step 2.
        asked["faults"] = [fault, None] if workdir.exists() else [fault, None, None]
        assert main.main(command) == 1
        told[fault] = capsys.readouterr().err.strip().splitlines()[-1]
        assert [row["step"] for row in rows(workdir)] == [1]
        (save,) = [f.name for f in (workdir / "checkpoints").iterdir() if f.name.isdecimal()]
        assert save == "1"
        command = [*command[:3], "--resume"]
    for fault in ("device", "host"):
        line = told[fault]
        assert line.startswith("speciarl: error: step 2: out of memory in the program 'step'")
        assert "lower train.prompts_per_micro_batch (now 2) or set to full model.remat" in line
        assert "saved after step 1: --resume then" in line
    assert "asked for 65536.00 GiB" in told["device"]
    assert told["judge"].endswith("judge cache: database is locked; stop who holds it")
    assert told["stopped"].endswith("step 2: too few labels; wait, then --resume")
    assert main.main(command) == 0
    assert [row["step"] for row in rows(workdir)] == [1, 2]
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 2


def test_out_of_memory_before_the_first_step_is_one_line_too():
    from speciarl_jax.config.schema import Config

    def start():
        with out_of_memory.told_memory(Config()):
            jnp.zeros(HUGE, jnp.float32).block_until_ready()

    with pytest.raises(TrainingStopped, match=r"asked for 65536\.00 GiB.*same command again"):
        start()


def test_what_xla_has_planned_for_a_program_is_told():
    """[2^28] float32 in, [2^27] out and, as nothing fuses over a sort, as much between them."""

    @jax.jit
    def update_step(x):
        return jnp.sort(x)[: 2**27]

    before = out_of_memory.planned_bytes("update")
    program = update_step.lower(jax.ShapeDtypeStruct((2**28,), jnp.float32)).compile()
    plan = program.memory_analysis()
    planned = out_of_memory.planned_bytes("update")
    assert plan.temp_size_in_bytes >= 2**30
    assert planned == 2**30 + 2**29 + plan.temp_size_in_bytes > before
    assert out_of_memory.planned_bytes("encode") < 2**30


def test_another_error_of_the_device_keeps_its_traceback():
    from speciarl_jax.config.schema import Config

    def start():
        with out_of_memory.told_memory(Config()):
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        start()
