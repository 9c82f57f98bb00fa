"""The libtpu that the extra `plan` brings, and what is said of another one."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from speciarl_jax.plan.chips import libtpu_misfit

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "cpu_smoke.py")
PIN = next(r for r in importlib.metadata.requires("jax") if r.startswith("libtpu"))
PINNED = re.search(r"==([\d.]+)\.\*", PIN)[1]


def install(folder, version):
    """Metadata of a libtpu, as pip leaves it, beside a package that holds no library."""
    record = folder / f"libtpu-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n")
    (folder / "libtpu").mkdir()
    (folder / "libtpu" / "__init__.py").write_text("")


@pytest.fixture
def libtpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda version: install(tmp_path, version)


def test_another_libtpu_is_named_with_the_one_that_fits_and_the_command(libtpu):
    libtpu("9.9.9")
    assert libtpu_misfit("v5e:2x2") == (
        f"libtpu 9.9.9 is installed, jax {jax.__version__} needs libtpu=={PINNED}.*; "
        f"pip install 'jax[tpu]=={jax.__version__}'"
    )
    assert libtpu_misfit("gpu:l4x2") == ""


def test_the_pinned_libtpu_fits(libtpu, monkeypatch):
    libtpu(f"{PINNED}.1")
    assert libtpu_misfit("v5e:2x2") == ""


def test_a_library_of_one_s_own_is_taken_as_it_is(libtpu, monkeypatch):
    libtpu("9.9.9")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/some/libtpu.so")
    assert libtpu_misfit("v5e:2x2") == ""


def test_a_plan_that_dies_with_another_libtpu_says_what_to_install(tmp_path):
    install(tmp_path, "9.9.9")
    env = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    result = subprocess.run(
        [sys.executable, "-m", "speciarl_jax.cli", "plan", f"--config={SMOKE}",
         "--topology=v5e:2x2"],
        env=env | {"PYTHONPATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode in (1, 2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("speciarl: error:")
    assert "libtpu 9.9.9 is installed" in last
    assert f"needs libtpu=={PINNED}.*; pip install 'jax[tpu]=={jax.__version__}'" in last


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_fresh_environment_from_the_extra_plans(tmp_path):
    """`pip install .[plan]` from a copy of the tree: package data and the pinned libtpu."""
    pip = [sys.executable, "-m", "pip"]
    found = subprocess.run([*pip, "index", "versions", "libtpu"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("needs a package index")
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("speciarl_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", f"{source}[plan]"], check=True)
    result = subprocess.run(
        [str(venv / "bin" / "speciarl"), "plan", f"--config={SMOKE}", "--topology=v5e:2x2",
         "--config.train.prompts_per_micro_batch=4", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
