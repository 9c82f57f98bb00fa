"""One run, one process group: the lock of a folder and the lease of an address."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from speciarl_jax.config.schema import Config
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.run.lock import LOCK_NAME, Lease, hold_folder
from speciarl_jax.run.storage import open_run_dir
from speciarl_jax.run.store import Store
from speciarl_jax.run.workdir import claimed_workdir

BEAT_S = 0.05


def test_a_held_folder_is_refused_and_free_again_afterwards(tmp_path):
    folder = tmp_path / "run"
    with hold_folder(folder):
        (folder / "kept").write_text("")
        with pytest.raises(ValueError, match=rf"{folder}: process {os.getpid()} on .* trains"):
            hold_folder(folder).__enter__()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with hold_folder(folder):
        pass


def test_a_folder_that_stayed_empty_is_left_as_it_was_found(tmp_path):
    with hold_folder(tmp_path / "new"):
        pass
    (tmp_path / "old").mkdir()
    with hold_folder(tmp_path / "old"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


HOLDER = """
import pathlib, sys, time
from speciarl_jax.run.lock import hold_folder
with hold_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on"):
            hold_folder(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
    with hold_folder(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def _count(folder, laps):
    """Adds to a number in a file while holding the folder; the sum shows whether two ever did."""
    done = 0
    while done < laps:
        try:
            with hold_folder(folder):
                file = folder / "number"
                number = int(file.read_text())
                time.sleep(0.001)
                file.write_text(str(number + 1))
            done += 1
        except ValueError:
            time.sleep(0.001)


def test_two_processes_never_hold_a_folder_together(tmp_path):
    """The file of the lock comes and goes all the time."""
    (tmp_path / "number").write_text("0")
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_count, args=(tmp_path, 60)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert (tmp_path / "number").read_text() == "180"


def test_a_second_resume_of_a_run_is_refused_before_it_touches_anything(tmp_path):
    run_dir = open_run_dir(tmp_path / "run")
    with claimed_workdir(run_dir, Config(), resume=False, overwrite=False):
        (run_dir.local / "metrics.jsonl").write_text('{"step": 1}\n')
        for flags in ({"resume": True}, {"overwrite": True}, {}):
            flags = {"resume": False, "overwrite": False} | flags
            other = claimed_workdir(open_run_dir(tmp_path / "run"), Config(), **flags)
            with pytest.raises(ValueError, match="trains there; wait for it or stop it"):
                other.__enter__()
        assert (run_dir.local / "metrics.jsonl").exists()
    with claimed_workdir(run_dir, Config(), resume=True, overwrite=False):
        pass


# Leases


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield Store(files)
    files.rm("/", recursive=True)


def take(store):
    return Lease(store, "/run/run.lock", "gs://bucket/run", BEAT_S)


def test_a_lease_that_is_renewed_is_refused(store):
    lease = take(store)
    with pytest.raises(ValueError, match=rf"gs://bucket/run: process {os.getpid()} on .* trains"):
        take(store)
    lease.check()
    lease.close()
    take(store).close()
    assert not store.exists("/run/run.lock")


def test_a_lease_that_nobody_renews_is_taken(store):
    store.write("/run/run.lock", json.dumps({"owner": "gone", "pid": 1}).encode())
    lease = take(store)
    assert json.loads(store.read("/run/run.lock"))["pid"] == os.getpid()
    lease.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_lease_is_one_that_nobody_renews(store, content):
    store.write("/run/run.lock", content)
    lease = take(store)
    assert json.loads(store.read("/run/run.lock"))["pid"] == os.getpid()
    lease.close()
    assert not store.exists("/run/run.lock")


def test_of_several_that_come_at_once_at_most_one_gets_the_lease(store):
    got, refused = [], []

    def come():
        try:
            got.append(take(store))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) <= 1
    assert len(got) + len(refused) == 6
    for lease in got:
        lease.close()


def test_who_has_lost_the_lease_writes_nothing_more(store):
    lease = take(store)
    store.write("/run/run.lock", json.dumps({"owner": "another", "pid": 2}).encode())
    while not lease.is_lost:
        time.sleep(BEAT_S)
    with pytest.raises(TrainingStopped, match="another process has taken this run over"):
        lease.check()
    lease.close()
    assert json.loads(store.read("/run/run.lock"))["owner"] == "another"


def test_an_address_is_held_by_one_machine(tmp_path, monkeypatch):
    from speciarl_jax.run import lock
    from speciarl_jax.run.storage import Spool

    monkeypatch.setattr(lock, "BEAT_S", BEAT_S)
    url = f"file://{tmp_path}/bucket/run"
    first, second = Spool(url, tmp_path / "a"), Spool(url, tmp_path / "b")
    with first.hold():
        assert first.push() == 0  # the lease is no file of the run
        with pytest.raises(ValueError, match=f"{url}: process .* trains there"):
            second.hold().__enter__()
    with second.hold():
        pass
    assert not (tmp_path / "bucket" / "run" / LOCK_NAME).exists()
