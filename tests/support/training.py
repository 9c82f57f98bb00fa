"""Small runs of the real trainer, for tests of more than one room."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from speciarl_jax import errors, train
from speciarl_jax.monitor import writer
from tests.support.tiny_policy import small_config as random_config

ROOT = pathlib.Path(__file__).parents[2]

QUIET = {"eval__score_base": False, "eval__score_trained": False}


def small_config(**changes):
    """The shipped policy: its answers earn different rewards, so gradients are not zero."""
    settings = {"model__path": "tiny", "rollout__max_completion_tokens": 40}
    return random_config(**settings, eval__max_completion_tokens=40, **changes)


def validated_config(**changes):
    """As `small_config`; four validation pictures are looked at before and after every step."""
    return small_config(
        train__eval_every=1, eval__policy_samples=3, data__num_validation=4, **changes
    )


def rows(workdir):
    return [writer.deterministic(r) for r in writer.read_rows(workdir / "metrics.jsonl")]


def run_cli(*arguments, **kwargs):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "speciarl_jax.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, **kwargs
    )


def stop_after_first_row(workdir):
    """SIGTERM to this process as soon as the run has written a row."""

    def watch():
        file = workdir / "metrics.jsonl"
        while not (file.is_file() and file.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def run_stopped_and_resumed(tmp_path, **changes):
    """(rows of a whole run, rows of one that was stopped by SIGTERM and resumed)."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main(small_config(**changes, **QUIET), whole)
    thread = stop_after_first_row(stopped)
    with pytest.raises(errors.Preempted):
        train.main(small_config(**changes, **QUIET), stopped)
    thread.join()
    assert 1 <= len(rows(stopped)) < len(rows(whole))
    train.main(small_config(**changes, **QUIET), stopped, resume=True)
    return rows(whole), rows(stopped)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
