"""Several real processes train like one; when one dies all end, and another number goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from speciarl_jax.metrics import deterministic, read_rows
from tests.test_hosts import free_port

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "cpu_smoke.py"
SETTINGS = ["data.num_eval=8", "eval.best_of=0", "train.save_every=1", "rollout.group_size=4"]
pytestmark = pytest.mark.slow


def start(workdir, count, num_steps, *flags):
    """The processes of a training job."""
    port = free_port()
    command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--config={RECIPE}"]
    command += [f"--workdir={workdir}", f"--config.train.num_steps={num_steps}", *flags]
    command += [f"--config.{setting}" for setting in SETTINGS]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    jobs = []
    for index in range(count):
        place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        place = [*place, f"--process_id={index}"] if count > 1 else []
        pipe = subprocess.PIPE
        jobs.append(
            subprocess.Popen(command + place, stdout=pipe, stderr=pipe, text=True, env=environment)
        )
    return jobs


def finish(jobs):
    for job in jobs:
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors[-2000:]


def rows_of(workdir):
    """Metrics that do not depend on how rows are batched for decoding."""
    rows = [deterministic(row) for row in read_rows(workdir / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k != "rollout/slot_utilization"} for row in rows]


def assert_same(rows, expected):
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start(workdir, 1, 3))
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_same_metrics_as_one_process(count, alone, tmp_path):
    finish(start(tmp_path / "run", count, 3))
    assert_same(rows_of(tmp_path / "run"), rows_of(alone))
    answers = [
        sorted((workdir / "eval" / "trained" / "predictions.jsonl").read_text().splitlines())
        for workdir in (alone, tmp_path / "run")
    ]
    names = ("dataset", "prompt_id", "completion", "category", "reward")
    found = [[{k: json.loads(line)[k] for k in names} for line in part] for part in answers]
    assert found[0] == found[1]


def test_one_dies_all_end_and_fewer_go_on(alone, tmp_path):
    workdir = tmp_path / "run"
    jobs = start(workdir, 2, 200)
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "1").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    jobs[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = jobs[0].communicate(timeout=60)
    assert jobs[0].returncode != 0, errors
    jobs[1].communicate()
    print(f"the other process ended after {time.monotonic() - killed:.1f} s")
    done = max(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )
    finish(start(workdir, 1, max(done + 1, 3), "--resume"))
    assert_same(rows_of(workdir)[:4], rows_of(alone))
