"""The real main: two steps, resume after a kill, refusals."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax import train
from speciarl_jax.cli import main
from speciarl_jax.data.field_guide.specimens import draw_specimens, encode_png
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge import runner
from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.run import checkpoint
from speciarl_jax.run.state import TrainState
from tests.support.training import QUIET, rows, run_cli, small_config, validated_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps that looks at its validation pictures before and after each."""
    workdir = tmp_path_factory.mktemp("run")
    train.main(validated_config(), workdir)
    return workdir


def test_run_leaves_what_it_promises(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"metrics.jsonl", "config.json", "checkpoints", "rollouts", "eval", "plots"} <= names
    assert [r["step"] for r in rows(finished)] == [0, 1, 2]
    for name in ("base", "trained"):
        scores = json.loads((finished / "eval" / name / "metrics.json").read_text())
        assert scores["datasets"]["field_guide_birds"]["n"] == 8
    first = rows(finished)[1]
    assert first["mismatch/logprob_max_abs"] < 1e-4
    assert first["policy/grad_norm"] > 0
    assert sum(v for k, v in first.items() if k.startswith("category/")) == pytest.approx(1)


def lines(file):
    return file.read_text().splitlines()


def test_validations_read_their_own_split_and_score_greedy_answers_and_samples(finished):
    splits = {
        folder.name: {json.loads(line)["prompt_id"].split("/")[1] for line in lines(file)}
        for folder in (finished / "eval").iterdir()
        if (file := folder / "predictions.jsonl").is_file()
    }
    scored = ("base", "trained", *(f"validation_{step:06d}" for step in range(3)))
    assert splits == {
        f"{name}{suffix}": {"validation" if name.startswith("validation") else "test"}
        for name in scored
        for suffix in ("", "_sampled")
    }
    validated = {r["step"]: r for r in map(json.loads, lines(finished / "metrics.jsonl"))}
    for step in range(3):
        for kind, suffix, samples in (("eval", "", 1), ("eval_sampled", "_sampled", 3)):
            folder = finished / "eval" / f"validation_{step:06d}{suffix}"
            scores = json.loads((folder / "metrics.json").read_text())["averages"]["all"]
            assert scores["n"] == 4 * samples
            assert validated[step][f"{kind}/all/correctness"] == scores["correctness"]["value"]
    sampled = json.loads((finished / "eval" / "base_sampled" / "settings.json").read_text())
    assert (sampled["sampling"]["temperature"], sampled["samples"]) == (1.0, 3)


def test_resume_ends_with_the_same_metrics_bit_for_bit(finished, tmp_path):
    stopped = tmp_path / "run"
    train.main(validated_config(train__num_steps=1, eval__score_trained=False), stopped)
    train.main(validated_config(), stopped, resume=True)
    assert rows(stopped) == rows(finished)
    for part in ("base", "trained"):
        a, b = (w / "eval" / part / "predictions.jsonl" for w in (stopped, finished))
        assert a.read_text() == b.read_text()


@pytest.mark.slow
def test_resume_skips_a_damaged_checkpoint(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    train.main(validated_config(eval__score_base=False, eval__score_trained=False), workdir)
    for file in (workdir / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    train.main(
        validated_config(eval__score_base=False, eval__score_trained=False), workdir, resume=True
    )
    assert "cannot be read" in capsys.readouterr().out
    assert rows(workdir) == rows(finished)


def cut(path):
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damaged", "remedy"),
    [
        ("config.json", "or start again with --overwrite"),
        ("eval/base/settings.json", "delete the folder; it is scored again"),
        ("checkpoints/*/position/**/*", "or start again with --overwrite"),
        ("checkpoints/*/state/**/*", "or start again with --overwrite"),
    ],
)
def test_half_a_file_on_resume_is_one_line_with_path_and_remedy(
    finished, tmp_path, capsys, damaged, remedy
):
    workdir, recipe = tmp_path / "run", tmp_path / "recipe.py"
    shutil.copytree(finished, workdir)
    recipe.write_text(
        "from tests.support.training import validated_config\n\n"
        "def get_config(arg=None):\n    return validated_config()\n"
    )
    for file in [file for file in workdir.glob(damaged) if file.is_file()]:
        cut(file)
    code = main.main(["train", f"--config={recipe}", f"--workdir={workdir}", "--resume"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith(f"speciarl: error: {workdir}/{damaged.split('/*')[0]}")
    assert remedy in last


def test_used_directory_is_refused(finished):
    with pytest.raises(ValueError, match="--resume"):
        train.main(small_config(), finished)


def test_resume_with_another_recipe_is_refused(finished):
    with pytest.raises(ValueError, match=r"rollout\.group_size was 4"):
        train.main(validated_config(rollout__group_size=5), finished, resume=True)


def test_closed_judge_port_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_JUDGE_STARTUP_S", 2.0)
    config = small_config(
        judge__kind="endpoint", judge__endpoints=("http://127.0.0.1:9/v1",), judge__model="m"
    )
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9"):
        train.main(config, tmp_path / "run")


def test_no_checkpoint_to_resume_is_refused(tmp_path):
    store, zero = checkpoint.Checkpoints(tmp_path, keep=1), jnp.zeros(())
    with pytest.raises(ValueError, match="nothing to resume from"):
        store.restore(TrainState(nnx.State({}), OptimState({}, zero, zero), 0, {}))
    store.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"--config={CONFIGS}/cpu_smoke.py", "--config.rollout.grup_size=2"], "no such field"),
        ([f"--config={CONFIGS}/cpu_smoke.py:n=1"], "rollout.group_size=1"),
        ([f"--config={CONFIGS}/none.py"], "no such recipe file"),
        ([f"--config={CONFIGS}/cpu_smoke.py:foo=1"], "expected key=value out of reward=dynamic"),
        ([f"--config={CONFIGS}/cpu_smoke.py", "--config.model.path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, arguments, expected):
    code = main.main(["train", *arguments, f"--workdir={tmp_path / 'run'}"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len([line for line in lines if line.startswith("speciarl: error:")]) == 1
    assert expected in lines[-1]


RECIPE = """
from tests.support.training import small_config

def get_config(arg=None):
    return small_config(train__num_steps={steps}, eval__score_base=False,
                        eval__score_trained=False)
"""


@pytest.mark.slow
def test_kill_at_any_moment_then_resume(tmp_path):
    """kill -9 in mid-run, twice; the resumed run's metrics equal those of a run never killed."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(steps=6))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_cli("train", f"--config={recipe}", f"--workdir={whole}").returncode == 0
    rng = np.random.default_rng(0)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--config={recipe}"]
        command += [f"--workdir={killed}"]
        if (killed / "config.json").is_file():
            command.append("--resume")
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
        seen = len(rows(killed)) if (killed / "metrics.jsonl").is_file() else 0
        while process.poll() is None:
            file = killed / "metrics.jsonl"
            if file.is_file() and len(file.read_text().splitlines()) > seen:
                time.sleep(rng.random() * 0.5)
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.02)
    result = run_cli("train", f"--config={recipe}", f"--workdir={killed}", "--resume")
    assert result.returncode == 0, result.stderr
    assert rows(killed) == rows(whole)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(steps=50))
    workdir = tmp_path / "run"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--config={recipe}"]
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"], env=env, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not (workdir / "metrics.jsonl").is_file() or not rows(workdir):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 75
    last = rows(workdir)[-1]["step"]
    store = checkpoint.Checkpoints(workdir / "checkpoints", 3)
    assert store.steps()[-1] == last
    store.close()


def test_jax_runs_on_eight_fake_devices():
    assert jax.device_count() == 8


def test_validation_pictures_are_held_out_in_a_run(tmp_path):
    """Eight pictures of a folder without a validation split: two validate, six are trained on."""
    pictures = tmp_path / "pictures"
    for number, specimen in enumerate(draw_specimens("bird", "test", 10)):
        folder = pictures / "train" / specimen.species.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png(specimen))
    (pictures / "test").mkdir()
    shutil.copytree(folder, pictures / "test" / folder.name)
    spec = f"folder:{pictures}"
    config = small_config(
        data__source=spec,
        data__eval_sources=(spec,),
        data__num_validation=2,
        train__num_steps=2,
        train__eval_every=2,
        **QUIET,
    )
    train.main(config, tmp_path / "run")

    def ids(place):
        files = (tmp_path / "run").glob(place)
        return {json.loads(line)["prompt_id"] for file in files for line in lines(file)}

    trained = ids("rollouts/*.jsonl")
    validated = ids("eval/validation_000002/predictions.jsonl")
    assert len(validated) == 2
    assert len(trained) >= 6
    assert not trained & validated
    assert all("/train/" in name for name in validated)
