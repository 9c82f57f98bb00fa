"""The spool: what changed is copied, what is gone is deleted, another machine goes on."""

import contextlib
import pathlib
import sqlite3

import aiohttp
import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from speciarl_jax import errors
from speciarl_jax.config.schema import Config
from speciarl_jax.run.storage import Spool, open_run_dir
from speciarl_jax.run.store import Store
from speciarl_jax.run.workdir import prepare_workdir


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket/run"


def test_push_copies_changes_only(tmp_path, url):
    spool = Spool(url, tmp_path / "a")
    (spool.local / "eval" / "base").mkdir(parents=True)
    (spool.local / "eval" / "base" / "data").write_bytes(b"one")
    (spool.local / "metrics.jsonl").write_text("1\n")
    assert spool.push() == 2
    assert spool.push() == 0
    (spool.local / "metrics.jsonl").write_text("1\n2\n")
    (spool.local / "eval" / "base" / "data").unlink()
    assert spool.push() == 1
    elsewhere = Spool(url, tmp_path / "b")
    assert elsewhere.pull() == 1
    assert (elsewhere.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert not (elsewhere.local / "eval" / "base" / "data").exists()
    assert elsewhere.push() == 0


def test_open_database_is_copied_whole(tmp_path, url):
    spool = Spool(url, tmp_path / "a")
    live = sqlite3.connect(spool.local / "cache.sqlite")
    live.execute("pragma journal_mode=wal")
    live.execute("create table verdicts (answer text)")
    live.execute("insert into verdicts values ('wren')")
    live.commit()  # in the journal, not yet in the file
    assert spool.push() == 1
    assert spool.push() == 0
    live.execute("insert into verdicts values ('robin')")
    live.commit()  # the file itself has not changed since
    assert spool.push() == 1
    live.close()
    elsewhere = Spool(url, tmp_path / "b")
    elsewhere.pull()
    copy = sqlite3.connect(elsewhere.local / "cache.sqlite")
    assert copy.execute("select answer from verdicts").fetchall() == [("wren",), ("robin",)]
    copy.close()


def test_pull_makes_a_mirror(tmp_path, url):
    """Nothing of another run, and no journal of a database that is replaced, survives."""
    spool = Spool(url, tmp_path / "a")
    (spool.local / "config.json").write_bytes(b"new")
    spool.push()
    stale = Spool(url, tmp_path / "b")
    for name in ("config.json", "verdicts.sqlite-wal", "metrics.jsonl"):
        (stale.local / name).write_bytes(b"old")
    stale.pull()
    assert [path.name for path in stale.local.iterdir()] == ["config.json"]
    assert (stale.local / "config.json").read_bytes() == b"new"


def test_an_evaluation_pushes_its_own_folders_only(tmp_path, url):
    training = Spool(url, tmp_path)
    (training.local / "metrics.jsonl").write_text("1\n")
    training.push()
    beside = Spool(url, tmp_path, only=("eval",))
    assert beside.local != training.local
    beside.pull()
    (beside.local / "metrics.jsonl").write_text("2\n")
    (beside.local / "eval").mkdir()
    (beside.local / "eval" / "scores").write_text("3\n")
    assert beside.push() == 1
    assert (tmp_path / "bucket" / "run" / "metrics.jsonl").read_text() == "1\n"


def test_each_address_has_its_own_folder(tmp_path, url):
    assert Spool(url, tmp_path).local != Spool(url + "x", tmp_path).local
    assert Spool(url, tmp_path).pull() == 0


def test_unknown_address(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        Spool("nosuch://bucket/run", tmp_path)
    assert not isinstance(open_run_dir(tmp_path), Spool)


def test_checkpoints_are_written_in_place(tmp_path, url):
    for run_dir in (open_run_dir(tmp_path / "run"), Spool(url, tmp_path / "spool")):
        (run_dir.local / "checkpoints").mkdir(parents=True)
        (run_dir.local / "checkpoints" / "stray").write_text("own")
        assert run_dir.push() == 0
    assert str(run_dir.checkpoints) == f"{tmp_path}/bucket/run/checkpoints"
    assert str(open_run_dir(tmp_path / "run").checkpoints) == f"{tmp_path}/run/checkpoints"


def test_other_processes_bring_their_own_files(tmp_path, url):
    first, second = (Spool(url, tmp_path / "a", process=k) for k in (0, 1))
    assert first.local != second.local
    (first.local / "metrics.jsonl").write_text("1\n")
    (second.local / "heartbeat.1.json").write_text("{}")
    assert (first.push(), second.push()) == (1, 1)
    first, second = (Spool(url, tmp_path / "b", process=k) for k in (0, 1))
    assert (first.pull(), second.pull()) == (2, 1)
    assert [path.name for path in second.local.iterdir()] == ["heartbeat.1.json"]
    assert (first.push(), second.push()) == (0, 0)


def test_a_used_address_is_not_overwritten(tmp_path, url):
    """Also by a machine whose local folder is empty, or holds what was left of an older run."""
    run_dir = Spool(url, tmp_path / "a")
    prepare_workdir(run_dir, Config())
    (run_dir.local / "metrics.jsonl").write_text("1\n")
    run_dir.push()
    bucket = tmp_path / "bucket" / "run"
    (bucket / "checkpoints" / "1").mkdir(parents=True)
    (bucket / "checkpoints" / "1" / "data").write_text("")
    (bucket / "notes.txt").write_text("mine")
    elsewhere = Spool(url, tmp_path / "b")
    with pytest.raises(ValueError, match=r"bucket/run: holds a run already; use --resume"):
        prepare_workdir(elsewhere, Config())
    prepare_workdir(elsewhere, Config(), resume=True)
    assert (elsewhere.local / "metrics.jsonl").read_text() == "1\n"
    prepare_workdir(elsewhere, Config(), overwrite=True)
    assert not (elsewhere.local / "metrics.jsonl").exists()
    assert sorted(path.name for path in bucket.iterdir()) == ["config.json", "notes.txt"]
    prepare_workdir(run_dir, Config(), resume=True)  # what the first machine still held is gone too
    assert not (run_dir.local / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="no run there"):
        prepare_workdir(open_run_dir(tmp_path / "typo"), Config(), resume=True)


def test_names_that_lead_out_of_the_spool_are_left_alone(tmp_path, capsys):
    """Whoever can write to a bucket cannot write to the machine that pulls from it."""
    files, place = fsspec.filesystem("file"), f"{tmp_path}/bucket/run"
    odd = ("../outside", "eval/../../outside", "eval//base", "./config.json", "eval/")
    for name in ("config.json", "eval/base/metrics.json"):
        files.makedirs(f"{place}/eval/base", exist_ok=True)
        files.pipe_file(f"{place}/{name}", b"{}")
    spool = Spool(f"file://{place}", tmp_path / "a" / "b")
    spool._remote = Store(Listed([f"{place}/{name}" for name in odd]))
    assert spool.pull() == 2
    written = {f.relative_to(spool.local) for f in (tmp_path / "a").rglob("*") if f.is_file()}
    assert {str(name) for name in written} == {"config.json", "eval/base/metrics.json"}
    assert "4 odd names are left alone: ['../outside', " in capsys.readouterr().err


class Listed(LocalFileSystem):
    """A store that lists names besides its own, as object stores may hold any."""

    cachable = False

    def __init__(self, names):
        super().__init__()
        self.names = names

    def find(self, path):
        return [*super().find(path), *self.names]

    def get_file(self, path, target):
        if path in self.names:
            pathlib.Path(target).write_text("escaped")
        else:
            super().get_file(path, target)


class Refusing(fsspec.AbstractFileSystem):
    """A store whose client raises an error of its own, as gcsfs does, on every call."""

    cachable = False

    def __init__(self, error):
        super().__init__()
        self.error = error

    def refuse(self, *args, **kwargs):
        raise self.error

    exists = find = cat_file = pipe_file = get_file = put_file = makedirs = rm = refuse


@pytest.mark.parametrize(
    "error",
    [
        "gcsfs",
        aiohttp.ClientPayloadError("cut short"),
        TimeoutError("took too long"),
        ConnectionResetError("gone"),
    ],
)
@pytest.mark.parametrize("act", ["push", "pull", "holds_run", "was_started", "hold"])
def test_what_a_store_fails_with_is_an_oserror_of_one_line(tmp_path, error, act):
    if error == "gcsfs":
        client = pytest.importorskip("gcsfs.retry")
        error = client.HttpError({"code": 403, "message": "no access to\nbucket"})
    spool = Spool(f"file://{tmp_path}/bucket/run", tmp_path)
    (spool.local / "metrics.jsonl").write_text("1\n")
    spool._remote = Store(Refusing(error))

    def run():
        with contextlib.ExitStack() as stack:
            result = getattr(spool, act)()
            if act == "hold":
                stack.enter_context(result)

    with pytest.raises(OSError, match=r".") as told:
        run()
    assert errors.exit_code(told.value) == 1
    if not isinstance(error, OSError):
        assert "the store refuses" in str(told.value)
        assert "\n" not in str(told.value)
    assert (spool.local / "metrics.jsonl").exists()
