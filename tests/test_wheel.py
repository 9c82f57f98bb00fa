"""The wheel alone, outside the repository, trains and scores: package data came along."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "speciarl_jax", "configs")
SMALL = ("train.num_steps=2", "data.num_eval=4", "rollout.group_size=2", "eval.best_of=0")


def run(*command, **kwargs):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_wheel_runs_two_steps_outside_the_repository(tmp_path):
    tree, venv, work = (tmp_path / name for name in ("tree", "venv", "work"))
    tree.mkdir()
    work.mkdir()
    for part in PARTS:  # without build folders of this one
        place = ROOT / part
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tree / part)
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(tree))
    (wheel,) = tmp_path.glob("speciarl_jax-*.whl")
    shutil.rmtree(tree)
    # Its dependencies are this environment's, the package is the wheel's alone.
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = venv / "lib" / version / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", str(venv / "bin" / "python"), "install", "--no-deps", str(wheel))
    shutil.copy(ROOT / "configs" / "cpu_smoke.py", work)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [venv / "bin" / "speciarl", "train", "--config=cpu_smoke.py", "--workdir=run"]
    settings = [f"--config.{setting}" for setting in SMALL]
    run(*map(str, command), *settings, cwd=work, env={**clean, "JAX_PLATFORMS": "cpu"})
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    where = "import speciarl_jax; print(speciarl_jax.__file__)"
    assert run(str(venv / "bin" / "python"), "-c", where, cwd=work).startswith(str(venv))
    page = [str(venv / "bin" / "speciarl"), "report", "run", "--out=page.html"]
    run(*page, cwd=work, env=clean)
    assert (work / "page.html").stat().st_size > 100_000
