"""Several real processes train like one; when one dies all end, and another number goes on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from speciarl_jax.monitor.writer import deterministic, read_rows
from tests.support.training import free_port

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "cpu_smoke.py"
SETTINGS = ["data.num_eval=8", "eval.best_of=0", "train.save_every=1", "rollout.group_size=4"]
SETTINGS += ["optim.schedule=constant"]  # a linear one depends on the number of steps
pytestmark = pytest.mark.slow


def start(workdir, count, num_steps, *flags, verb="train", recipe=RECIPE, environment=None):
    """The processes of a job."""
    port = free_port()
    command = [sys.executable, "-m", "speciarl_jax.cli", verb, f"--config={recipe}"]
    command += [f"--workdir={workdir}", f"--config.train.num_steps={num_steps}", *flags]
    command += [f"--config.{setting}" for setting in SETTINGS]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | (environment or {})
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
    """What they print."""
    outputs = []
    for job in jobs:
        output, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors[-2000:]
        outputs.append(output)
    return outputs


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


JOB = "--config.rollout.scope=job"
SPANNING = "--config.mesh.tensor=2"  # a replica is two processes of one device


@pytest.mark.parametrize(
    ("count", "flags"), [(2, []), (4, []), (2, [JOB]), (4, [JOB]), (2, [SPANNING]), (4, [SPANNING])]
)
def test_same_metrics_as_one_process(count, flags, alone, tmp_path):
    finish(start(tmp_path / "run", count, 3, *flags))
    assert_same(rows_of(tmp_path / "run"), rows_of(alone))
    answers = [
        sorted((workdir / "eval" / "trained" / "predictions.jsonl").read_text().splitlines())
        for workdir in (alone, tmp_path / "run")
    ]
    names = ("dataset", "prompt_id", "completion", "category", "reward")
    found = [[{k: json.loads(line)[k] for k in names} for line in part] for part in answers]
    assert found[0] == found[1]


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("scope", ["host", "job"])
def test_one_dies_all_end_and_fewer_go_on(scope, alone, tmp_path):
    workdir = tmp_path / "run"
    jobs = start(workdir, 2, 200, f"--config.rollout.scope={scope}")
    wait_for(workdir / "checkpoints" / "1")
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


def test_a_stop_of_one_process_saves_all_within_the_step(tmp_path):
    """Nothing but step 0 is there to be saved: the first step is left between two chunks."""
    workdir = tmp_path / "run"
    settings = ["rollout.chunk_tokens=2", "train.eval_every=0", "eval.score_base=False"]
    jobs = start(workdir, 2, 200, JOB, *(f"--config.{setting}" for setting in settings))
    wait_for(workdir / "heartbeat.1.json")  # written between chunks
    jobs[1].send_signal(signal.SIGTERM)
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 75, errors[-2000:]
        assert "stopped by signal after step 0, saved in" in errors
    assert (workdir / "checkpoints" / "0").is_dir()


PACKED = ["train.micro_batch_tokens=4096"]
ASYNC = ["train.async_steps=1", "algo.importance_cap=2.0"]
SFT = ["data.num_eval=8", "train.prompts_per_update=16", "train.prompts_per_step=16"]
SFT += ["train.prompts_per_micro_batch=8", "eval.score_trained=False"]
ASYNC_JOB = [*ASYNC, "rollout.scope=job"]
MODES = {
    "packed": (RECIPE, PACKED),
    "async": (RECIPE, ASYNC),
    "async_job": (RECIPE, ASYNC_JOB),
    "sft": (f"{RECIPE.parent / 'tiny_sft.py'}:model=tiny", SFT),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_one_process(mode, tmp_path):
    """Asynchronous rollouts of two processes also go on in one."""
    recipe, settings = MODES[mode]
    flags = [f"--config.{setting}" for setting in settings]
    finish(start(tmp_path / "one", 1, 3, *flags, recipe=recipe))
    finish(start(tmp_path / "two", 2, 3, *flags, recipe=recipe))
    assert_same(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))
    if mode.startswith("async"):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "3")
        finish(start(tmp_path / "two", 1, 3, *flags, "--resume"))
        assert_same(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"))


@pytest.mark.parametrize("mode", [[], ASYNC_JOB])
def test_dynamic_sampling_fills_every_process(mode, tmp_path):
    settings = ["algo.generation_prompts=8", "algo.reward=binary", *mode]
    flags = [f"--config.{setting}" for setting in settings]
    finish(start(tmp_path, 2, 2, *flags, recipe=f"{RECIPE}:algo=dapo_dynamic"))
    for row in rows_of(tmp_path)[1:]:
        assert row["rollout/generation_batches"] >= 2
        assert row["group/kept_frac"] * 8 * row["rollout/generation_batches"] >= 16
        assert row["group/kept_frac"] + row["group/zero_std_frac"] == pytest.approx(1)


@pytest.fixture
def bucket():
    """A Google Cloud Storage on this machine."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.gcs_server", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    address = f"http://localhost:{port}"
    yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    server.kill()
    server.communicate()


def test_object_storage(alone, bucket, tmp_path):
    """Two processes write to a bucket, one on another machine goes on and two more score it."""
    first, second = (bucket | {"HOME": str(tmp_path / name)} for name in ("first", "second"))
    url = "gs://bucket/runs/a"
    finish(start(url, 2, 2, "--resume=auto", environment=first))
    refused = start(url, 1, 3, environment=second)
    _, errors = refused[0].communicate(timeout=300)
    assert refused[0].returncode != 0
    assert f"--workdir={url}: holds a run already; use --resume" in errors
    finish(start(url, 1, 3, "--resume=auto", environment=second))
    local = next((tmp_path / "second").rglob("metrics.jsonl")).parent
    for row, other in zip(rows_of(local), rows_of(alone), strict=True):
        shared = row.keys() & other.keys()  # the first job validated after step 2
        assert row["step"] == 0 or "policy/loss" in shared
        expected = pytest.approx({k: other[k] for k in shared}, rel=1e-5, abs=1e-5)
        assert {k: row[k] for k in shared} == expected
    jobs = start(url, 2, 3, "--json", verb="eval", environment=first)
    scores = json.loads(finish(jobs)[0].splitlines()[-1])  # Gloo prints a line before
    assert scores == json.loads((local / "eval" / "trained" / "metrics.json").read_text())
