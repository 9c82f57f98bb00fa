"""Files that are whole or not there, and JSON whose damage names the file."""

import ast
import contextlib
import json
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from speciarl_jax.config.schema import Config
from speciarl_jax.evaluate import claim_folder
from speciarl_jax.files import name_when_whole, read_json, whole_file, write_whole
from speciarl_jax.monitor.watch import Heartbeat
from speciarl_jax.report.load import load_run
from speciarl_jax.run.restore import read_config
from speciarl_jax.run.storage import RunDir
from speciarl_jax.run.workdir import is_of_run, prepare_workdir

PACKAGE = pathlib.Path(__file__).parents[1] / "speciarl_jax"


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "grün\n")
    write_whole(file, b"second")
    assert file.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    write_whole(file, "grün")
    assert file.read_bytes() == "grün".encode()


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError), whole_file(file) as partial:
        partial.write_text("new \ud800", encoding="utf-8")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(tmp_path):
    file = tmp_path / "config.json"
    write_whole(file, "old")
    script = (
        "import os, signal, sys\n"
        "from speciarl_jax.files import whole_file\n"
        "with whole_file(sys.argv[1]) as partial:\n"
        "    partial.write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(file)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    (left,) = [path for path in tmp_path.iterdir() if path != file]
    assert left.name.endswith(".partial")
    assert name_when_whole(left.name) == "config.json"
    assert is_of_run(left.name)  # --overwrite takes it away
    assert not is_of_run("notes.txt.12345678.partial")


def test_a_link_stays_a_link_and_a_device_is_written_to(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_whole("/dev/null", "new")
    assert not pathlib.Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"a": "b', dict, "Unterminated string"),
        (b"", dict, "not valid JSON"),
        (b"\0\0\0", dict, "not valid JSON"),
        (b"\xff\xfe", dict, "not valid JSON"),
        (b"[]", dict, "list where JSON holds an object"),
        (b"{}", list, "dict where JSON holds a list"),
        (b"null", (dict, list), "NoneType where JSON holds an object or a list"),
    ],
)
def test_damaged_json_names_file_and_remedy(tmp_path, content, kind, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, "make it again", kind)
    assert str(caught.value).startswith(f"{file}: ")
    assert str(caught.value).endswith("; make it again")
    assert "\n" not in str(caught.value)


def rewrite(name, workdir):
    """Writes one small file of a run again."""
    if name == "config.json":
        prepare_workdir(RunDir(workdir), Config(), resume=True)
    elif name == "settings.json":
        claim_folder(workdir, {"weights": "base", "long": "x" * 4096})
    else:
        Heartbeat(workdir, 0).beat(1)


@pytest.mark.parametrize("name", ["config.json", "settings.json", "heartbeat.json"])
def test_a_write_that_fails_half_way_keeps_the_file(tmp_path, name):
    """A file may grow to 16 bytes only, as on a disk that is full."""
    if name == "config.json":
        prepare_workdir(RunDir(tmp_path), Config())
    else:
        (tmp_path / name).write_text("{}")
    before = (tmp_path / name).read_bytes()
    refused = pytest.raises(OSError, match=f"File too large: '{tmp_path}/{name}'")
    if name == "heartbeat.json":  # only warns: the step in progress is worth more
        refused = contextlib.nullcontext()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
    try:
        with refused:
            rewrite(name, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda folder: prepare_workdir(RunDir(folder), Config(), resume=True)),
        ("config.json", read_config),
        ("config.json", load_run),
        ("settings.json", lambda folder: claim_folder(folder, {"weights": "base"})),
    ],
)
def test_half_a_file_of_a_run_is_named(tmp_path, name, read):
    (tmp_path / "predictions.jsonl").write_text("")
    (tmp_path / name).write_text(json.dumps({"name": "unnamed", "seed": 0})[:10])
    with pytest.raises(ValueError, match="Unterminated string") as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: not valid JSON")
    assert "; " in str(caught.value)


def calls(tree, *names):
    """Calls of methods and functions by their last two names, ``os.replace``, ``?.write_text``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else "?"
            if {f"{owner}.{node.func.attr}", f"?.{node.func.attr}"} & set(names):
                yield node


def test_nobody_writes_or_parses_a_whole_file_in_another_way():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "files.py":
            continue
        tree = ast.parse(file.read_text("utf-8"))
        odd = [*calls(tree, "?.write_text", "?.write_bytes", "os.replace", "json.load")]
        odd += [node for node in calls(tree, "json.loads") if [*calls(node, "?.read_text")]]
        found += [f"{file}:{node.lineno}" for node in odd]
    assert found == []


def test_a_disk_that_refuses_is_told_with_the_file(tmp_path):
    """The system says where it cannot open a file, not where it cannot write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/file\.json'"):
            write_whole(tmp_path / "file.json", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
