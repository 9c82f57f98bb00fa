"""The import rules of docs/design.md: which way imports point, and what a room may touch."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "speciarl_jax"

# A module may import rooms of its own level or lower ones.
LEVELS = [
    {"types", "files", "arch", "flops", "clock", "preemption", "hosts", "storage", "watch"},
    {"config", "judge", "presets"},
    {
        "data",
        "optim",
        "sharding",
        "scoring",
        "bootstrap",
        "predictions",
        "text_metrics",
        "text_model",
    },
    {"policy", "reward", "advantage", "weights", "loss", "scores"},
    {"rollout", "update", "batching", "packing", "convert", "metrics", "live", "report", "tiny"},
    {"session", "checkpoint", "workdir"},
    {"gather"},
    {"learn"},
    {"step_metrics", "programs", "plan"},
    {"step", "evaluate"},
    {"overlap"},
    {"sft", "export_run", "sample_command", "run_report"},
    {"train"},
    {"eval_command"},
    {"cli"},
]
HOST_ONLY = {
    "types",
    "files",
    "arch",
    "flops",
    "clock",
    "scores",
    "config",
    "judge",
    "data",
    "reward",
    "advantage",
    "weights",
}
HOST_ONLY |= {"scoring", "bootstrap", "predictions", "text_metrics", "text_model", "report"}
DEVICE_FILES = ("policy", "rollout", "update", "loss")
FORBIDDEN_ON_DEVICE = {"socket", "os", "subprocess", "asyncio", "aiohttp", "openai", "urllib"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py" or path.parent != PACKAGE:
            yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "speciarl_jax":
                yield from (f"speciarl_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_point_one_way():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    wrong = []
    for path, here in modules():
        for name in imports(path, top_level_only=True):
            there = room(name)
            if name.startswith("speciarl_jax.") and there != here and level[there] > level[here]:
                wrong.append(f"{path.name} -> {name}")
    assert wrong == []


def test_host_side_never_imports_jax():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, here in modules()
        if here in HOST_ONLY
        # The clock's compile listener imports jax when it is first asked.
        for name in imports(path, top_level_only=here == "clock")
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax")
    ]
    assert wrong == []


def test_device_side_opens_nothing():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, here in modules()
        if here in DEVICE_FILES
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN_ON_DEVICE
    ]
    assert wrong == []


def test_no_blanket_except():
    wrong = []
    for path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                name = ast.unparse(node.type) if node.type else "everything"
                reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                if name == "everything" or (
                    name in ("Exception", "BaseException") and not reraises
                ):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert wrong == []


def test_files_stay_readable():
    long = [
        str(path.relative_to(PACKAGE))
        for path, _ in modules()
        if len(path.read_text().splitlines()) > 450
    ]
    assert long == []


@pytest.mark.parametrize("name", ["judge.client", "reward", "data.loader", "scoring", "clock"])
def test_importing_the_host_side_starts_no_backend(name):
    code = (
        f"import speciarl_jax.{name}, sys\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert bridge is None or not bridge._backends, bridge._backends\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
