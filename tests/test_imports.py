"""The import rules of docs/design.md: which way imports point, and what a room may touch."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "speciarl_jax"

# Rooms from the door down: each imports its own files and those of later lines only.
ROOMS = """
    cli
    train
    evaluate
    algorithm
    monitor
    run
    plan
    learner
    rollout
    convert
    report
    policy
    scoring
    objective
    devices
    data
    judge
    config
    arch
    types errors timing files
""".strip().splitlines()
HOST_ONLY = {
    "timing",
    "types",
    "arch",
    "errors",
    "files",
    "config",
    "judge",
    "data",
    "scoring",
    "report",
}
HOST_FILES = {"objective/reward.py", "objective/advantage.py", "objective/token_weights.py"}
HOST_FILES |= {"algorithm/credit.py"}
DEVICE_ROOMS = {"policy", "rollout", "learner"}
DEVICE_FILES = {"objective/loss.py"}
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
    level = {name: i for i, line in enumerate(ROOMS) for name in line.split()}
    wrong = []
    for path, here in modules():
        for name in imports(path):
            there = room(name)
            if name.startswith("speciarl_jax.") and there != here and level[there] < level[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} -> {name}")
    assert wrong == []


def test_host_side_never_imports_jax():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, here in modules()
        if here in HOST_ONLY or path.relative_to(PACKAGE).as_posix() in HOST_FILES
        # The compile listener imports jax when it is first asked.
        for name in imports(path, top_level_only=here == "timing")
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax")
    ]
    assert wrong == []


def test_device_side_opens_nothing():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, here in modules()
        if here in DEVICE_ROOMS or path.relative_to(PACKAGE).as_posix() in DEVICE_FILES
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


@pytest.mark.parametrize(
    "name", ["judge.client", "objective.reward", "data.loader", "scoring.metrics", "timing"]
)
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
