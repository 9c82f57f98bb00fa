"""A directory is a run's from its first result on; what a continuation may change."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from speciarl_jax.config.schema import Config
from speciarl_jax.run.storage import Spool, open_run_dir
from speciarl_jax.run.workdir import claimed_workdir, prepare_workdir
from tests.support.training import free_port

RESULTS = ("checkpoints/5/position/metadata", "metrics.jsonl", "eval/base/predictions.jsonl")
LEFTOVERS = (
    "checkpoints/5.orbax-checkpoint-tmp/state/x",
    "tensorboard/events",
    "heartbeat.json",
    "rollouts/step_000001.jsonl",
    "eval/base/settings.json",
    "notes.txt",
)


@pytest.fixture(params=["folder", "address"])
def run_dir(request, tmp_path, monkeypatch):
    monkeypatch.setattr("speciarl_jax.run.lock.BEAT_S", 0.05)
    if request.param == "folder":
        return open_run_dir(tmp_path / "run")
    return Spool(f"file://{tmp_path}/bucket/run", tmp_path / "spool")


def put(run_dir, name, text="1\n"):
    for root in {run_dir.local, run_dir.checkpoints.parent}:
        file = type(run_dir.local)(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def names(run_dir):
    root = type(run_dir.local)(run_dir.checkpoints.parent)
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_not_written_over(run_dir, name):
    put(run_dir, name)
    with pytest.raises(ValueError, match="holds a run already"):
        prepare_workdir(run_dir, Config())


def test_a_start_without_a_result_is_free(run_dir):
    prepare_workdir(run_dir, Config(name="first"))
    for name in LEFTOVERS:
        put(run_dir, name)
    prepare_workdir(run_dir, Config(name="second"))
    assert json.loads((run_dir.local / "config.json").read_text())["name"] == "second"
    prepare_workdir(run_dir, Config(name="second"), resume=True)


@pytest.mark.parametrize("error", [ValueError("no model"), KeyboardInterrupt()])
def test_a_start_that_fails_before_a_result_leaves_nothing_of_a_run(run_dir, error):
    put(run_dir, "notes.txt", "mine")

    def start():
        with claimed_workdir(run_dir, Config(), resume=False, overwrite=False):
            for name in ("heartbeat.json", "tensorboard/events", "judge_cache.sqlite"):
                (run_dir.local / name).parent.mkdir(exist_ok=True)
                (run_dir.local / name).write_text("x")
            run_dir.push()
            raise error

    with pytest.raises(type(error)):
        start()
    assert names(run_dir) == {"notes.txt", "judge_cache.sqlite"}  # labels were paid for


def test_a_run_that_fails_after_a_result_stays(run_dir):
    def start():
        with claimed_workdir(run_dir, Config(), resume=False, overwrite=False):
            put(run_dir, "metrics.jsonl")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        start()
    assert {"config.json", "metrics.jsonl"} <= names(run_dir)
    prepare_workdir(run_dir, Config(), resume=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "endpoint"), ("model", "other"), ("prompt", "verl"), ("temperature", 0.5)],
)
def test_another_judge_is_refused_unless_told(tmp_path, capsys, field, value):
    run_dir, other = open_run_dir(tmp_path), Config()
    prepare_workdir(run_dir, Config())
    setattr(other.judge, field, value)
    with pytest.raises(ValueError, match=rf"judge\.{field} was .*, is {value!r} now.*--new_judge"):
        prepare_workdir(run_dir, other, resume=True)
    prepare_workdir(run_dir, other, resume=True, new_judge=True)
    assert "rewards mean something else" in capsys.readouterr().err
    prepare_workdir(run_dir, other, resume=True)  # the new one is the run's from now on


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("judge", "endpoints", ("http://127.0.0.1:1/v1",)),
        ("judge", "concurrency", 3),
        ("judge", "requests_per_minute", 60),
        ("judge", "timeout_s", 5.0),
        ("model", "remat", "full"),
        ("train", "prompts_per_micro_batch", 1),
        ("rollout", "max_cache_mb", 500),
        ("train", "num_steps", 7),
    ],
)
def test_what_changes_no_number_may_change(tmp_path, capsys, section, field, value):
    run_dir, other = open_run_dir(tmp_path), Config()
    other.optim.schedule = "constant"
    prepare_workdir(run_dir, other)
    setattr(getattr(other, section), field, value)
    prepare_workdir(run_dir, other, resume=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decaying_schedule_that_is_stretched_is_told(tmp_path, capsys, schedule):
    run_dir, config = open_run_dir(tmp_path), Config()
    config.optim.schedule = schedule
    prepare_workdir(run_dir, config)
    prepare_workdir(run_dir, config, resume=True)
    assert capsys.readouterr().err == ""
    config.train.num_steps += 100
    prepare_workdir(run_dir, config, resume=True)
    assert f"optim.schedule={schedule} is stretched" in capsys.readouterr().err


def test_auto_goes_on_with_a_run_and_else_starts_one(run_dir):
    config = Config(name="first")
    with claimed_workdir(run_dir, config, "auto") as is_resumed:
        assert not is_resumed
    with claimed_workdir(run_dir, config, "auto") as is_resumed:
        assert not is_resumed  # a start without a result is nobody's run
        put(run_dir, "metrics.jsonl")
    with claimed_workdir(run_dir, config, "auto") as is_resumed:
        assert is_resumed
    other = claimed_workdir(run_dir, Config(name="second"), "auto")
    with pytest.raises(ValueError, match="--resume with another recipe"), other:
        pass


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_and_overwrite_exclude_each_other(run_dir, resume):
    with (
        pytest.raises(ValueError, match="exclude each other"),
        claimed_workdir(run_dir, Config(), resume, overwrite=True),
    ):
        pass


def test_bare_resume_wants_a_run(run_dir):
    claimed = claimed_workdir(run_dir, Config(), True)
    with pytest.raises(ValueError, match="no run there; leave --resume out"), claimed:
        pass


@pytest.mark.parametrize("is_there", [False, True])
def test_auto_is_decided_by_the_first_process_for_all(tmp_path, is_there):
    """Each has a folder of its own here, so the second would find the contrary."""
    with_run = tmp_path / ("0" if is_there else "1")
    with_run.mkdir()
    (with_run / "metrics.jsonl").write_text("1\n")
    (with_run / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    command = [sys.executable, "-m", "tests.support.claim_worker", str(free_port()), "2"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([*command, index, tmp_path], stdout=pipe, text=True, env=environment)
        for index in ("0", "1")
    ]
    found = [worker.communicate(timeout=120)[0].splitlines()[-1] for worker in workers]
    assert found == [str(is_there)] * 2
