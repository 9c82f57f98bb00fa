"""The launch scripts: what a dry run prints, restarts on exit code 75, nothing deleted unasked."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
RECIPE = "--config=configs/qwen2_5_vl_7b_v5e.py"
ARGUMENTS = {
    "create.sh": [],
    "setup.sh": [],
    "train.sh": [RECIPE, "--config.seed=1"],
    "judge.sh": ["train"],
    "eval.sh": [RECIPE],
    "fetch.sh": ["runs/x"],
    "delete.sh": [],
    "gke.sh": [RECIPE],
    "slurm.sbatch": ["runs/x", RECIPE],
    "restart.sh": ["runs/x", RECIPE],
}


def run_script(name, *arguments, text="", **environment):
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [SCRIPTS / name, *arguments],
        env=base | environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def fake_program(folder, body, name="speciarl"):
    """A program that writes its arguments to calls.txt and then runs `body`."""
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\necho "$@" >> {folder}/calls.txt\n{body}\n')
    file.chmod(0o755)
    return str(file)


def calls(folder):
    file = folder / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_every_script_is_covered_here():
    found = {p.name for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch")}
    assert found - {"common.sh"} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_dry_run_prints_and_exits_0(name):
    result = run_script(name, *ARGUMENTS[name], DRY_RUN="1", PATH="/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    assert "would run:" in result.stdout


def test_dry_run_of_train_names_restart_and_endpoint():
    url = "http://h:8000/v1"
    result = run_script("train.sh", *ARGUMENTS["train.sh"], DRY_RUN="1", JUDGE_URL=url, ZONE="z1")
    assert "tpu_scripts/restart.sh" in result.stdout
    assert url in result.stdout
    assert "--zone=z1" in result.stdout
    assert "<PROJECT>" in result.stdout.replace("\\", "")


def test_a_token_is_not_printed():
    arguments = ARGUMENTS["train.sh"]
    result = run_script("train.sh", *arguments, DRY_RUN="1", HF_TOKEN="hf_secret")
    assert "hf_secret" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["create.sh", "train.sh", "delete.sh", "gke.sh"])
def test_a_missing_setting_is_one_line_and_2(name):
    result = run_script(name, *ARGUMENTS[name])
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "PROJECT is not set" in result.stderr


def test_create_takes_the_image_of_the_generation_and_spot(tmp_path):
    fake_program(tmp_path, 'echo "ACTIVE"', "gcloud")
    path = f"{tmp_path}:/usr/bin:/bin"
    settings = {"PROJECT": "p", "ZONE": "z", "ACCELERATOR": "v6e-16", "SPOT": "1"}
    result = run_script("create.sh", PATH=path, **settings)
    assert result.returncode == 0, result.stderr
    created, described = calls(tmp_path)
    assert "--runtime-version=v2-alpha-tpuv6e" in created
    assert "--spot" in created.split()
    assert described.startswith("compute tpus queued-resources describe")


def test_create_stops_on_a_failed_request(tmp_path):
    fake_program(tmp_path, 'echo "FAILED"', "gcloud")
    result = run_script("create.sh", PATH=f"{tmp_path}:/usr/bin:/bin", PROJECT="p", ZONE="z")
    assert result.returncode == 2
    assert "is FAILED" in result.stderr


@pytest.mark.parametrize(("answer", "deleted"), [("", 0), ("y\n", 0), ("speciarl\n", 1)])
def test_delete_asks_for_the_name(tmp_path, answer, deleted):
    fake_program(tmp_path, "", "gcloud")
    path = f"{tmp_path}:/usr/bin:/bin"
    result = run_script("delete.sh", text=answer, PATH=path, PROJECT="p", ZONE="z")
    assert len(calls(tmp_path)) == deleted
    assert (result.returncode == 0) == bool(deleted)


def test_restart_goes_on_after_75_and_asks_nobody_whether_there_is_a_run(tmp_path):
    """The training itself looks: a listing of the bucket from here may fail, gcloud be absent."""
    program = fake_program(
        tmp_path, f"[[ $(wc -l < {tmp_path}/calls.txt) -lt 3 ]] && exit 75; exit 0"
    )
    path = f"{tmp_path}:/usr/bin:/bin"
    fake_program(tmp_path, "exit 1", "gcloud")
    result = run_script("restart.sh", "gs://b/run", RECIPE, SPECIARL=program, PATH=path)
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == [f"train {RECIPE} --workdir=gs://b/run --resume=auto"] * 3


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_restart_passes_other_codes_on(tmp_path, code):
    program = fake_program(tmp_path, f"exit {code}")
    result = run_script("restart.sh", str(tmp_path / "run"), RECIPE, SPECIARL=program)
    assert result.returncode == code
    assert len(calls(tmp_path)) == 1


def test_restart_is_bounded(tmp_path):
    program = fake_program(tmp_path, "exit 75")
    workdir = str(tmp_path / "run")
    result = run_script("restart.sh", workdir, RECIPE, SPECIARL=program, MAX_RESTARTS="2")
    assert result.returncode == 75
    assert len(calls(tmp_path)) == 3


def test_sigterm_reaches_the_training_and_ends_the_loop(tmp_path):
    saves = f"trap 'sleep .2; touch {tmp_path}/saved; exit 75' TERM\nsleep 20 & wait"
    program = fake_program(tmp_path, saves)
    process = subprocess.Popen(
        [SCRIPTS / "restart.sh", tmp_path / "run", RECIPE],
        env={"PATH": os.environ["PATH"], "SPECIARL": program},
        start_new_session=True,
    )
    try:
        while not calls(tmp_path):
            time.sleep(0.01)
        time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=10) == 75
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the fake's sleep
    assert (tmp_path / "saved").exists()
    assert len(calls(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = [p for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch")]
    result = subprocess.run(
        ["shellcheck", "-x", "-P", SCRIPTS.parent, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
