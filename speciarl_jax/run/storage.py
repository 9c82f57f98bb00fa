"""Run directories: an ordinary folder, or one on object storage.

Object stores have no append and no SQLite, so a run with ``--workdir=gs://bucket/run`` works in a
local spool folder and `Spool.push` copies what changed at each save; a run that goes on elsewhere
starts with `Spool.pull`, which makes the folder a mirror. Checkpoints are not copied: Orbax writes
them to the address itself, all processes of a job their own pieces.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator

import fsspec
from etils import epath

from speciarl_jax.run.lock import LOCK_NAME, Lease, hold_folder
from speciarl_jax.run.store import Store

_SPOOL_ROOT = pathlib.Path("~/.cache/speciarl/spool")
_CHECKPOINTS = "checkpoints"
_TRANSIENT = ("-wal", "-shm", ".tmp", ".partial")  # SQLite's journals and half-written files


class RunDir:
    """A run directory that all processes see; there is nothing to copy.

    Attributes:
        local: the folder to work in.
        checkpoints: where Orbax writes.
    """

    def __init__(self, local: pathlib.Path) -> None:
        """Reads and writes nothing."""
        self.local = local
        self.checkpoints = epath.Path(local.resolve()) / _CHECKPOINTS
        self._lease: Lease | None = None

    def was_started(self) -> bool:
        """Whether a run was started there, so that it can be resumed."""
        return (self.local / "config.json").is_file()

    def holds_run(self) -> bool:
        """Whether there is anything to lose: a checkpoint, a metrics row or a score."""
        found = (path for path in self.local.rglob("*") if path.is_file() and path.stat().st_size)
        return any(_is_result(path.relative_to(self.local).parts) for path in found)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps other processes from training here; see `run.lock`.

        Raises:
            ValueError: one does.
            OSError: the folder cannot be made or written to.
        """
        with hold_folder(self.local) as self._lease:
            yield

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the run over."""
        return self._lease is not None and self._lease.is_lost

    def check_held(self) -> None:
        """Call before something is written that the next holder reads.

        Raises:
            TrainingStopped: another process has taken the run over.
        """
        if self._lease is not None:
            self._lease.check()

    def forget(self, names: set[str]) -> None:
        """Deletes these files and folders of the run, where they exist."""
        for path in [self.local / name for name in sorted(names)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def pull(self) -> int:
        """Brings what other machines have written; returns the copied files."""
        return 0

    def push(self) -> int:
        """Shares what was written here; returns the copied files."""
        return 0

    def delete_remote(self, is_of_run: Callable[[str], bool]) -> None:
        """Deletes what `is_of_run` names where the run is kept, unless that is `local`."""


class Spool(RunDir):
    """A local folder and the remote one that it is copied to."""

    def __init__(
        self,
        url: str,
        root: pathlib.Path = _SPOOL_ROOT,
        process: int = 0,
        only: tuple[str, ...] = (),
    ) -> None:
        """Chooses the local folder; reads and writes nothing remote.

        Args:
            url: ``gs://bucket/path``, or ``s3://``, ``az://``, ``file://``.
            root: where spool folders lie; each address and process has its own.
            process: number of this process. All but the first leave what they share with the
                first (metrics, settings) to it; the files they write have names of their own.
            only: folders of the run that are pushed, all of it if empty. Such a spool lies in a
                folder of its own, for a command that works beside a training run.

        Raises:
            ValueError: nobody here can read such addresses.
        """
        try:
            files, path = fsspec.core.url_to_fs(url)
            where = path if url.startswith("file://") else url
            checkpoints = epath.Path(where.rstrip("/")) / _CHECKPOINTS
        except (ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"--workdir={url}: cannot be opened ({error}); expected a folder or gs://, s3://, "
                "az://, file://; for gs:// install the extra `gcp`"
            ) from error
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        name += "".join(f"-{part}" for part in (*only, process) if part)
        super().__init__(root.expanduser() / name)
        self.checkpoints = checkpoints
        self.local.mkdir(parents=True, exist_ok=True)
        self._remote, self._url = Store(files), url
        self._path, self._process, self._only = path.rstrip("/"), process, only
        self._pushed: dict[str, tuple[int, ...]] = {}

    def was_started(self) -> bool:
        """Whether a run was started at the address."""
        return self._remote.exists(f"{self._path}/config.json")

    def holds_run(self) -> bool:
        """Whether a checkpoint, a metrics row or a score lies at the address."""
        return any(_is_result(tuple(name.split("/"))) for name in self._remote_files())

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the lease at the address, and the spool folder."""
        with hold_folder(self.local):
            self._lease = Lease(self._remote, f"{self._path}/{LOCK_NAME}", self._url)
            with contextlib.closing(self._lease):
                yield

    def forget(self, names: set[str]) -> None:
        """Deletes these files and folders of the run, here and at the address."""
        super().forget(names)
        self.delete_remote(lambda name: name in names)

    def pull(self) -> int:
        """Makes the local folder a mirror of the remote run; what is only here is deleted."""
        files = [name for name in self._remote_files() if _is_copied(name)]
        if self._process:
            files = [name for name in files if f".{self._process}." in name]
        kept = {self.local / name for name in files}
        for path in [path for path in self.local.rglob("*") if path.is_file()]:
            if path not in kept:
                path.unlink()
        self._pushed = {}
        for name in files:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._remote.get_file(f"{self._path}/{name}", str(target))
            self._pushed[name] = _stamp(target)
        return len(files)

    def push(self) -> int:
        """Copies new and changed files, deletes remote ones that are gone here.

        Nothing where another process has taken the run over.

        Raises:
            OSError: the store refuses; nothing local is lost, the next push tries again.
        """
        if self.is_lost:
            return 0
        files = (path for path in sorted(self.local.rglob("*")) if path.is_file())
        stamps = {path.relative_to(self.local).as_posix(): _stamp(path) for path in files}
        found = {name: stamp for name, stamp in stamps.items() if self._is_pushed(name)}
        changed = [name for name, stamp in found.items() if self._pushed.get(name) != stamp]
        for name in changed:
            self._put(name)
            self._pushed[name] = found[name]
        for name in [name for name in self._pushed if self._is_pushed(name) and name not in found]:
            with contextlib.suppress(FileNotFoundError):
                self._remote.delete(f"{self._path}/{name}")
            del self._pushed[name]
        return len(changed)

    def delete_remote(self, is_of_run: Callable[[str], bool]) -> None:
        """Deletes the run below the address, and nothing else that may lie there."""
        for name in {name.partition("/")[0] for name in self._remote_files()}:
            if is_of_run(name):
                self._remote.delete(f"{self._path}/{name}", recursive=True)

    def _is_pushed(self, name: str) -> bool:
        return _is_copied(name) and (not self._only or name.partition("/")[0] in self._only)

    def _put(self, name: str) -> None:
        target = f"{self._path}/{name}"
        if not name.endswith(".sqlite"):
            self._remote.put_file(str(self.local / name), target)
            return
        with tempfile.TemporaryDirectory() as folder:  # a consistent copy of a live database
            snapshot = pathlib.Path(folder) / "snapshot.sqlite"
            with (
                contextlib.closing(sqlite3.connect(self.local / name)) as source,
                contextlib.closing(sqlite3.connect(snapshot)) as copy,
            ):
                source.backup(copy)
            self._remote.put_file(str(snapshot), target)

    def _remote_files(self) -> list[str]:
        """Names below the address; those that would lead out of a folder are named and left."""
        names = self._remote.find(self._path) if self._remote.exists(self._path) else []
        below = [name[len(self._path) :].lstrip("/") for name in names]
        files = [name for name in below if name and not name.endswith("/")]  # no folder markers
        odd = [name for name in files if {"", ".", ".."} & set(name.split("/")) or "\0" in name]
        if odd:
            print(f"{self._url}: {len(odd)} odd names are left alone: {odd[:3]}", file=sys.stderr)
        return [name for name in files if name not in odd]


def open_run_dir(
    address: str | pathlib.Path, process: int = 0, only: tuple[str, ...] = ()
) -> RunDir:
    """A folder, or the spool of an address such as ``gs://bucket/run``; see `Spool`.

    Raises:
        ValueError: nobody here can read such addresses.
    """
    if "://" in str(address):
        return Spool(str(address), process=process, only=only)
    return RunDir(pathlib.Path(address))


def _is_copied(name: str) -> bool:
    is_own = name == LOCK_NAME or name.startswith(f"{_CHECKPOINTS}/")
    return not is_own and not name.endswith(_TRANSIENT)


def _is_result(parts: tuple[str, ...]) -> bool:
    """Whether a file below a run directory is part of a checkpoint, of metrics or of scores."""
    match parts:
        case ("metrics.jsonl",):
            return True
        case ("checkpoints", step, _, *_):
            return step.isdecimal()
        case ("eval", _, "predictions.jsonl" | "metrics.json"):
            return True
    return False


def _stamp(path: pathlib.Path) -> tuple[int, ...]:
    """Changes with the file's content; that of an open SQLite file may lie in its journal."""
    stamp: tuple[int, ...] = ()
    for file in (path, path.with_name(path.name + "-wal")):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if status.st_size:
                stamp += (status.st_size, status.st_mtime_ns)
    return stamp
