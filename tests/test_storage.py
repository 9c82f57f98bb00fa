"""The spool: what changed is copied, what is gone is deleted, another machine goes on."""

import sqlite3
import uuid

import pytest

from speciarl_jax.storage import Spool, is_remote


@pytest.fixture
def url():
    return f"memory://bucket/{uuid.uuid4().hex}"


def test_push_copies_changes_only(tmp_path, url):
    spool = Spool(url, tmp_path / "a")
    (spool.local / "checkpoints" / "1").mkdir(parents=True)
    (spool.local / "checkpoints" / "1" / "data").write_bytes(b"one")
    (spool.local / "metrics.jsonl").write_text("1\n")
    assert spool.push() == 2
    assert spool.push() == 0
    (spool.local / "metrics.jsonl").write_text("1\n2\n")
    (spool.local / "checkpoints" / "1" / "data").unlink()
    assert spool.push() == 1
    elsewhere = Spool(url, tmp_path / "b")
    assert elsewhere.pull() == 1
    assert (elsewhere.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert not (elsewhere.local / "checkpoints" / "1" / "data").exists()
    assert elsewhere.push() == 0


def test_open_database_is_copied_whole(tmp_path, url):
    spool = Spool(url, tmp_path / "a")
    live = sqlite3.connect(spool.local / "cache.sqlite")
    live.execute("pragma journal_mode=wal")
    live.execute("create table verdicts (answer text)")
    live.execute("insert into verdicts values ('wren')")
    live.commit()  # in the journal, not yet in the file
    assert spool.push() == 1
    live.close()
    elsewhere = Spool(url, tmp_path / "b")
    elsewhere.pull()
    copy = sqlite3.connect(elsewhere.local / "cache.sqlite")
    assert copy.execute("select answer from verdicts").fetchall() == [("wren",)]
    copy.close()


def test_each_address_has_its_own_folder(tmp_path, url):
    assert Spool(url, tmp_path).local != Spool(url + "x", tmp_path).local
    assert Spool(url, tmp_path).pull() == 0


def test_unknown_address(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        Spool("nosuch://bucket/run", tmp_path)
    assert is_remote("gs://bucket/run")
    assert not is_remote(tmp_path)
