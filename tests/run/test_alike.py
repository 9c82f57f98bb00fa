"""A job whose processes differ ends in all of them with one line that says which and in what."""

import os
import pathlib
import subprocess
import sys

import pytest

from speciarl_jax.config.schema import Config
from speciarl_jax.run.alike import differences, own_facts
from tests.support.training import free_port

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "cpu_smoke.py"
SAME = {"jax": "0.10.2", "seed": "0"}


def test_alike_is_no_difference():
    assert differences([SAME, SAME, SAME]) == []


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ([SAME, SAME, SAME | {"jax": "1"}], ["jax is 1 on process 2 and 0.10.2 on the others"]),
        # Process 0 may be the odd one.
        ([SAME | {"jax": "1"}, SAME, SAME], ["jax is 1 on process 0 and 0.10.2 on the others"]),
        ([SAME, SAME | {"jax": "1"}], ["jax is 1 on process 1 and 0.10.2 on the others"]),
        (
            [SAME, SAME | {"seed": "7"}, SAME, SAME | {"seed": "7"}, SAME, SAME | {"seed": "8"}],
            ["seed is 7 on process 1, 3, 8 on process 5 and 0 on the others"],
        ),
        ([SAME, {"jax": "0.10.2"}], ["seed is unknown on process 1 and 0 on the others"]),
        (
            [SAME, {"jax": "1", "seed": "2"}],
            [
                "jax is 1 on process 1 and 0.10.2 on the others",
                "seed is 2 on process 1 and 0 on the others",
            ],
        ),
    ],
)
def test_a_difference_names_the_process_and_the_values(facts, expected):
    assert differences(facts) == expected


def test_every_field_of_the_recipe_is_compared():
    config = Config()
    before = own_facts(config)
    config.seed, config.train.num_steps, config.judge.model = 5, 7, "other"
    changed = {name for name, value in own_facts(config).items() if before[name] != value}
    assert changed == {"seed", "train.num_steps", "judge.model"}
    assert {"speciarl-jax", "jax", "jaxlib", "libtpu"} <= before.keys()


def job(tmp_path, flags, environments):
    """The error lines and exit codes of a job of two, which ends before a model is loaded."""
    port = free_port()
    command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--config={RECIPE}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{port}"]
    base = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [*command, "--num_processes=2", f"--process_id={index}", *flags[index]],
            stderr=pipe,
            text=True,
            env=base | environments[index],
        )
        for index in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    lines = [[line for line in e.splitlines() if line.startswith("speciarl")] for e in errors]
    return lines, [worker.returncode for worker in workers]


def test_another_recipe_on_one_host_ends_all(tmp_path):
    flags = [["--config.seed=1"], ["--config.seed=1", "--config.train.num_steps=7"]]
    lines, codes = job(tmp_path, flags, [{}, {}])
    assert codes == [2, 2]
    assert lines[0] == lines[1]
    (line,) = lines[0]
    assert "differ: train.num_steps is 7 on process 1 and 100 on the others; install" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_libtpu_on_one_host_ends_all(tmp_path):
    folder = tmp_path / "libtpu-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 9.9\n")
    lines, codes = job(tmp_path, [[], []], [{}, {"PYTHONPATH": str(tmp_path)}])
    assert codes == [2, 2]
    assert all("differ: libtpu is 9.9 on process 1" in line for (line,) in lines)


@pytest.mark.slow
def test_what_one_host_lacks_ends_all_with_its_line(tmp_path):
    """Data in the home of one host only: the other ends, and does not wait for the heartbeat."""
    homes = [{"HOME": str(tmp_path / name)} for name in ("first", "second")]
    folder = tmp_path / "second" / ".cache" / "speciarl"
    folder.mkdir(parents=True)
    (folder / "data").write_text("where the pictures would be drawn")
    lines, codes = job(tmp_path, [[], []], homes)
    assert codes[0] == 2
    assert codes[1] in (1, 2)
    (there,) = lines[1]
    assert lines[0] == [there.replace("error: ", "error: process 1: ", 1)]
