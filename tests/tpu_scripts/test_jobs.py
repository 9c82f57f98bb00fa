"""train.sh, eval.sh, setup.sh and job.sh against one worker: a folder, behind fakes of gcloud and
systemd that really run what they are given, so that words pass through all shells."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
RECIPE = "--config=configs/r.py"
URLS = {"JUDGE_URL": "http://h:8000/v1", "EVAL_JUDGE_URL": "http://h:8001/v1"}
ENDPOINTS = [
    "--config.judge.endpoints=('http://h:8000/v1',)",
    "--config.eval.judge.endpoints=('http://h:8001/v1',)",
]

GCLOUD = """
echo "$@" >> "$PLACE/gcloud.txt"
cd "$PLACE/worker"
if [[ "$4" == scp ]]; then exec cp "$5" "./${6#*:}"; fi
for word in "$@"; do
  case "$word" in --command=*) # another machine: nothing of this environment is there
    exec env -i PATH="$PATH" PLACE="$PLACE" POLL_S="$POLL_S" HOME="$PLACE/worker" \\
      bash -c "${word#--command=}" ;;
  esac
done
"""
SYSTEMD_RUN = """
echo "$@" >> "$PLACE/systemd.txt"
while [[ "$1" != env ]]; do shift; done
setsid bash -c '"$@" >> speciarl.log 2>&1 < /dev/null & echo $! > "$PLACE/pid"
  wait $!; echo $? > "$PLACE/code"; rm "$PLACE/pid"' job "$@" > /dev/null 2>&1 &
while [[ ! -f "$PLACE/pid" && ! -f "$PLACE/code" ]]; do sleep .01; done
"""
SYSTEMCTL = """
case "$1" in
  is-active) [[ -f "$PLACE/pid" ]] ;;
  show) cat "$PLACE/code" ;;
  reset-failed) rm -f "$PLACE/code" ;;
  stop) kill -TERM "$(cat "$PLACE/pid")"; while [[ -f "$PLACE/pid" ]]; do sleep .01; done ;;
esac
"""
FAKES = {"gcloud": GCLOUD, "sudo": '"$@"', "systemd-run": SYSTEMD_RUN, "systemctl": SYSTEMCTL}


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def place(tmp_path):
    """Fakes in bin/, a worker's home with the scripts; its speciarl writes down its words."""
    for name, text in FAKES.items():
        write(tmp_path / "bin" / name, text)
    tree = tmp_path / "worker" / "speciarl-jax"
    shutil.copytree(SCRIPTS, tree / "tpu_scripts")
    becomes(tmp_path, "exit 0")
    yield tmp_path
    if (tmp_path / "pid").exists():
        os.killpg(os.getpgid(int((tmp_path / "pid").read_text())), signal.SIGKILL)


def becomes(place, body):
    """What the worker's program does after it has written down its words, one a line."""
    program = place / "worker" / "speciarl-jax" / ".venv" / "bin" / "speciarl"
    write(program, f'printf "%s\\n" "$@" >> "$PLACE/words.txt"; echo "a line of the log"\n{body}')


def environment(place, **settings):
    path = f"{place}/bin:/usr/bin:/bin"
    base = {"PATH": path, "HOME": str(place), "PLACE": str(place), "POLL_S": "0.05"}
    base |= {"PROJECT": "p", "ZONE": "z", "WORKDIR": "gs://b/runs/x"}
    return base | URLS | settings


def run(place, name, *arguments, **settings):
    return subprocess.run(
        [SCRIPTS / name, *arguments],
        env=environment(place, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def words(place):
    return (place / "words.txt").read_text().splitlines()


def test_words_of_a_training_arrive_as_they_were_given(place):
    odd = "--config.name=two words; $HOME 'quoted'"
    result = run(place, "train.sh", RECIPE, odd)
    assert result.returncode == 0, result.stderr
    cache = "--config.compile_cache_dir=gs://b/runs/xla-cache"
    expected = ["train", "--cluster", RECIPE, *ENDPOINTS, cache, odd]
    assert words(place) == [*expected, "--workdir=gs://b/runs/x", "--resume=auto"]
    assert "a line of the log" in result.stdout
    started, followed = (place / "gcloud.txt").read_text().splitlines()
    assert "--worker=all" in started
    assert "--worker=0" in followed


@pytest.mark.parametrize("setting", ["gs://c/d", ""])
def test_the_compile_cache_may_lie_elsewhere_or_nowhere(place, setting):
    result = run(place, "train.sh", RECIPE, COMPILE_CACHE=setting)
    assert result.returncode == 0, result.stderr
    found = [word for word in words(place) if "compile_cache" in word]
    assert found == [f"--config.compile_cache_dir={setting}"]


def test_scores_are_asked_of_the_evaluation_judge(place):
    result = run(place, "eval.sh", RECIPE, "--samples=64", JUDGE_URL="")
    assert result.returncode == 0, result.stderr
    assert words(place)[0] == "eval"
    assert {ENDPOINTS[1], "--samples=64", "--workdir=gs://b/runs/x"} <= set(words(place))
    assert ENDPOINTS[0] not in words(place)


@pytest.mark.parametrize("name", ["train.sh", "eval.sh"])
def test_without_the_evaluation_judge_nothing_starts(place, name):
    result = run(place, name, RECIPE, EVAL_JUDGE_URL="")
    assert result.returncode == 2
    assert "EVAL_JUDGE_URL is not set" in result.stderr
    assert not (place / "gcloud.txt").exists()


@pytest.mark.parametrize("name", ["train.sh", "eval.sh"])
def test_the_exit_code_comes_back(place, name):
    becomes(place, "exit 3")
    result = run(place, name, RECIPE)
    assert result.returncode == 3
    assert "ended with exit code 3" in result.stdout


SAVES = """trap 'echo saved; touch "$PLACE/saved"; exit 75' TERM
while true; do sleep .05; done"""


def test_a_training_outlives_the_connection_and_is_stopped_with_a_save(place):
    becomes(place, SAVES)
    command = [SCRIPTS / "train.sh", RECIPE]
    shown = subprocess.Popen(
        command, env=environment(place), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not (place / "words.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(shown.pid, signal.SIGKILL)  # the laptop is shut
    shown.wait()
    again = run(place, "train.sh", RECIPE)
    assert again.returncode == 2
    assert "a job runs here already" in again.stderr
    assert not (place / "saved").exists()
    assert run(place, "job.sh", "stop").returncode == 0
    assert (place / "saved").exists()
    assert "saved" in run(place, "job.sh", "log").stdout


def test_a_pod_that_is_stopped_saves(place):
    """gcluster's container runs `bash -c COMMAND`, and Kubernetes signals that first process."""
    write(place / "bin" / "gcluster", 'printf "%s" "${@: -1}" > "$PLACE/command.txt"')
    names = {name: name.lower() for name in ("CLUSTER", "IMAGE", "TOPOLOGY")}
    assert run(place, "gke.sh", RECIPE, **names).returncode == 0
    command = (place / "command.txt").read_text().removeprefix("--command=")
    app = place / "worker" / "speciarl-jax"
    becomes(place, SAVES)
    pod = subprocess.Popen(
        ["bash", "-c", command.replace("/app", str(app))],
        env=environment(place, SPECIARL=str(app / ".venv" / "bin" / "speciarl")),
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (place / "words.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        pod.terminate()
        assert pod.wait(timeout=20) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pod.pid, signal.SIGKILL)
    assert (place / "saved").exists()


def test_a_stop_reaches_the_first_process_alone(place):
    """restart.sh hands it on; a second SIGTERM to the training would be one too many."""
    run(place, "train.sh", RECIPE)
    call = (place / "systemd.txt").read_text()
    assert "--property=KillMode=mixed" in call
    assert "--unit=speciarl" in call


def tree_with(place, installer):
    """A repository whose committed tree has this install.sh."""
    tree = place / "mine"
    shutil.copytree(SCRIPTS, tree / "tpu_scripts")
    write(tree / "tpu_scripts" / "install.sh", installer)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        names = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *names, *arguments], cwd=tree, check=True)
    return tree / "tpu_scripts" / "setup.sh"


@pytest.mark.parametrize("source", ["HF_TOKEN", "HF_TOKEN_FILE"])
def test_a_token_travels_as_a_file_and_on_no_command_line(place, source):
    (place / "t").write_text("hf_secret")
    value = "hf_secret" if source == "HF_TOKEN" else str(place / "t")
    result = run(place, tree_with(place, "env > got.txt"), **{source: value})
    assert result.returncode == 0, result.stderr
    token = place / "worker" / ".cache" / "huggingface" / "token"
    assert token.read_text() == "hf_secret"
    assert token.stat().st_mode & 0o777 == 0o600
    told = (place / "gcloud.txt").read_text() + result.stdout + result.stderr
    assert "hf_secret" not in told


def test_setup_takes_data_and_disk_along_and_old_modules_away(place):
    old = place / "worker" / "speciarl-jax" / "speciarl_jax" / "gone.py"
    write(old, "")
    settings = {"DATA_URL": "gs://b/my data", "DATA_DISK": "big"}
    result = run(place, tree_with(place, "env > got.txt"), **settings)
    assert result.returncode == 0, result.stderr
    got = (place / "worker" / "speciarl-jax" / "got.txt").read_text().splitlines()
    assert {"DATA_URL=gs://b/my data", "DATA_DISK=big"} <= set(got)
    assert not old.exists()


def test_install_brings_data_and_mounts_the_disk_and_starts_no_tpu(place):
    for name in ("gcloud", "sudo", "python3.11"):
        write(place / "bin" / name, f'echo "{name} $*" >> "$PLACE/calls.txt"')
    write(place / "bin" / "mountpoint", "exit 1")
    tree = place / "worker" / "speciarl-jax"
    write(tree / ".venv" / "bin" / "python", 'echo "python $*" >> "$PLACE/calls.txt"')
    settings = {"DATA_URL": "gs://b/data", "DATA_DISK": "big", "DATA_DIR": str(place / "data")}
    result = subprocess.run(
        [SCRIPTS / "install.sh"],
        cwd=tree,
        env=environment(place, **settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = (place / "calls.txt").read_text()
    assert f"gcloud storage rsync --recursive gs://b/data {place}/data\n" in found
    assert "sudo mount -o ro,noload LABEL=speciarl /mnt/disks/data\n" in found
    assert "apt-get" not in found  # Python 3.11 is there
    assert "import jax" not in found
