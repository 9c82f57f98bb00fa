"""A stop at any moment of a run: what there is is saved, and the run that goes on ends the same."""

import json
import os
import signal
import threading
import time

import pytest

from speciarl_jax import errors, train
from speciarl_jax.cli import main
from tests.support.training import rows, small_config

SETTINGS = {
    "train__num_steps": 2,
    "train__eval_every": 1,
    "train__save_every": 5,
    "train__keep_best": 1,
    "data__num_validation": 4,
    "eval__prompts_per_batch": 2,
}
# Where a run is, and the file that tells.
PHASES = {
    "base": "eval/base/predictions.jsonl",
    "validation before step 1": "eval/validation_000000/predictions.jsonl",
    "validation": "eval/validation_000001/predictions.jsonl",
    "step": "eval/validation_000001/metrics.json",
    "last validation": "eval/validation_000002/predictions.jsonl",
    "end": "eval/trained/predictions.jsonl",
}


def when_written(file, act):
    """Calls `act` as soon as a file has content, in a thread that is returned."""

    def watch():
        while not (file.is_file() and file.stat().st_size):
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def scores(workdir):
    """Answers of all evaluations, and the numbers that steps were given."""
    files = sorted(workdir.glob("eval/*/predictions.jsonl"))
    return {f.parent.name: [json.loads(line) for line in f.read_text().splitlines()] for f in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train.main(small_config(**SETTINGS), workdir)
    return workdir


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        pytest.param("validation", signal.SIGINT, marks=SLOW),
        pytest.param("base", signal.SIGTERM, marks=SLOW),
        pytest.param("validation before step 1", signal.SIGTERM, marks=SLOW),
        pytest.param("step", signal.SIGINT, marks=SLOW),
        pytest.param("last validation", signal.SIGTERM, marks=SLOW),
        pytest.param("end", signal.SIGTERM, marks=SLOW),
    ],
)
def test_a_stop_at_any_moment_then_resume_ends_the_same(whole, tmp_path, phase, number):
    workdir = tmp_path / "run"
    watch = when_written(workdir / PHASES[phase], lambda: os.kill(os.getpid(), number))
    with pytest.raises(errors.Stopped) as stopped:
        train.main(small_config(**SETTINGS), workdir)
    watch.join()
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert stopped.value.is_resumed
    assert len(scores(workdir)) <= len(scores(whole))
    assert scores(workdir) != scores(whole)
    assert not (workdir / "run.lock").exists()
    train.main(small_config(**SETTINGS), workdir, resume=True)
    assert rows(workdir) == rows(whole)
    assert scores(workdir) == scores(whole)
    # The score of a validation that was cut short still counts for keep_best.
    for save in workdir.glob("checkpoints/[1-9]*"):
        (row,) = [row for row in rows(whole) if row["step"] == int(save.name)]
        kept = json.loads((save / "metrics" / "metrics").read_text())
        assert kept == {"hm": row["eval/all/hm"]}


def test_a_stop_while_a_run_is_opened_leaves_nothing(tmp_path, capsys):
    workdir, recipe = tmp_path / "run", tmp_path / "recipe.py"
    recipe.write_text(
        "from tests.support.training import small_config\n\n"
        "def get_config(arg=None):\n    return small_config()\n"
    )
    watch = when_written(workdir / "config.json", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code = main.main(["train", f"--config={recipe}", f"--workdir={workdir}"])
    watch.join()
    assert code == 75
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1] == f"go on with: speciarl train --config={recipe} --workdir={workdir}"
    assert "stopped by signal before there was anything to save" in told[-2]
    assert not workdir.exists()
