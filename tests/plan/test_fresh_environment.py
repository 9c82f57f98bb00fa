"""The extra `plan` in an environment of its own brings a libtpu that its jax fits.

Downloads some 500 MB through pip, so it is skipped where pip reaches no index.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "speciarl_jax", "configs")
MISFIT = "from speciarl_jax.plan.chips import libtpu_misfit; print(libtpu_misfit('v5e:2x2'))"


def run(*command, cwd):
    """What a command prints, out of reach of this environment's packages."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TPU_LIBRARY_PATH")}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_the_extra_plans_the_tiny_recipe(tmp_path):
    pip = (sys.executable, "-m", "pip", "--quiet")
    reach = [*pip, "download", "--no-deps", f"--dest={tmp_path / 'reach'}", "typing_extensions"]
    if subprocess.run(reach, capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no index")
    tree, venv = tmp_path / "tree", tmp_path / "venv"
    tree.mkdir()
    for part in PARTS:  # without build folders of this one
        place = ROOT / part
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tree / part)
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", f"{tree}[plan]", cwd=tmp_path)
    assert run(venv / "bin" / "python", "-c", MISFIT, cwd=tmp_path).strip() == ""
    recipe = ROOT / "configs" / "cpu_smoke.py"
    command = ["plan", f"--config={recipe}", "--topology=v5e:2x2", "--json"]
    plan = json.loads(run(venv / "bin" / "speciarl", *command, cwd=tmp_path))
    assert {"decode", "update"} <= {program["name"] for program in plan["programs"]}
