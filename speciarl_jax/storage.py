"""Run directories: an ordinary folder, or one on object storage.

Object stores have no append and no SQLite, so a run with ``--workdir=gs://bucket/run`` works in a
local spool folder and `Spool.push` copies what changed at each save; a run that goes on elsewhere
starts with `Spool.pull`. Checkpoints are not copied: Orbax writes them to the address itself, all
processes of a job their own pieces.
"""

from __future__ import annotations

import hashlib
import pathlib
import sqlite3
import tempfile
from collections.abc import Callable

import fsspec
from etils import epath

_SPOOL_ROOT = pathlib.Path("~/.cache/speciarl/spool")
_CHECKPOINTS = "checkpoints"
_TRANSIENT = ("-wal", "-shm", ".tmp")  # SQLite's journals and half-written files


class RunDir:
    """A run directory that all processes see; there is nothing to copy.

    Attributes:
        local: the folder to work in.
        is_copy: whether it is kept elsewhere.
        checkpoints: where Orbax writes.
    """

    is_copy = False

    def __init__(self, local: pathlib.Path) -> None:
        """Reads and writes nothing."""
        self.local = local
        self.checkpoints = epath.Path(local.resolve()) / _CHECKPOINTS

    def holds_run(self) -> bool:
        """Whether a run was started there."""
        return (self.local / "config.json").is_file()

    def pull(self) -> int:
        """Brings what other machines have written; returns the copied files."""
        return 0

    def push(self) -> int:
        """Shares what was written here; returns the copied files."""
        return 0

    def delete_remote(self, is_of_run: Callable[[str], bool]) -> None:
        """Deletes the run where it is kept, unless that is `local`.

        Args:
            is_of_run: whether a run writes a folder or file of this name.
        """


class Spool(RunDir):
    """A local folder and the remote one that it is copied to."""

    is_copy = True

    def __init__(self, url: str, root: pathlib.Path = _SPOOL_ROOT, process: int = 0) -> None:
        """Chooses the local folder; reads and writes nothing remote.

        Args:
            url: ``gs://bucket/path``, or ``s3://``, ``az://``, ``file://``.
            root: where spool folders lie; each address and process has its own.
            process: number of this process. All but the first leave what they share with the
                first (metrics, settings) to it; the files they write have names of their own.

        Raises:
            ValueError: nobody here can read such addresses.
        """
        try:
            self._remote, path = fsspec.core.url_to_fs(url)
            where = path if url.startswith("file://") else url
            checkpoints = epath.Path(where.rstrip("/")) / _CHECKPOINTS
        except (ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"--workdir={url}: cannot be opened ({error}); expected a folder or gs://, s3://, "
                "az://, file://; for gs:// install the extra `gcp`"
            ) from error
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        super().__init__(root.expanduser() / (f"{name}-{process}" if process else name))
        self.checkpoints = checkpoints
        self.local.mkdir(parents=True, exist_ok=True)
        self._path, self._process = path.rstrip("/"), process
        self._pushed: dict[str, tuple[int, int]] = {}

    def holds_run(self) -> bool:
        """Whether a run was started at the address."""
        return self._remote.exists(f"{self._path}/config.json")

    def pull(self) -> int:
        """Copies the remote run into the local folder, over what is there."""
        files = [name for name in self._remote_files() if self._is_copied(name)]
        if self._process:
            files = [name for name in files if f".{self._process}." in name]
        for name in files:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._remote.get_file(f"{self._path}/{name}", str(target))
            self._pushed[name] = _stamp(target)
        return len(files)

    def push(self) -> int:
        """Copies new and changed files, deletes remote ones that are gone here.

        Raises:
            OSError: the store refuses; nothing local is lost, the next push tries again.
        """
        files = (path for path in sorted(self.local.rglob("*")) if path.is_file())
        stamps = {path.relative_to(self.local).as_posix(): _stamp(path) for path in files}
        found = {name: stamp for name, stamp in stamps.items() if self._is_copied(name)}
        changed = [name for name, stamp in found.items() if self._pushed.get(name) != stamp]
        for name in changed:
            self._put(name)
            self._pushed[name] = found[name]
        for name in [name for name in self._pushed if name not in found]:
            self._remote.rm_file(f"{self._path}/{name}")
            del self._pushed[name]
        return len(changed)

    def delete_remote(self, is_of_run: Callable[[str], bool]) -> None:
        """Deletes the run below the address, and nothing else that may lie there."""
        for name in {name.partition("/")[0] for name in self._remote_files()}:
            if is_of_run(name):
                self._remote.rm(f"{self._path}/{name}", recursive=True)

    def _is_copied(self, name: str) -> bool:
        return not name.startswith(f"{_CHECKPOINTS}/") and not name.endswith(_TRANSIENT)

    def _put(self, name: str) -> None:
        target = f"{self._path}/{name}"
        self._remote.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not name.endswith(".sqlite"):
            self._remote.put_file(str(self.local / name), target)
            return
        with tempfile.TemporaryDirectory() as folder:  # a consistent copy of a live database
            snapshot = pathlib.Path(folder) / "snapshot.sqlite"
            source, copy = sqlite3.connect(self.local / name), sqlite3.connect(snapshot)
            with source, copy:
                source.backup(copy)
            source.close()
            copy.close()
            self._remote.put_file(str(snapshot), target)

    def _remote_files(self) -> list[str]:
        names = self._remote.find(self._path) if self._remote.exists(self._path) else []
        return [str(name)[len(self._path) :].lstrip("/") for name in names]


def open_run_dir(address: str | pathlib.Path, process: int = 0) -> RunDir:
    """A folder, or the spool of an address such as ``gs://bucket/run``.

    Raises:
        ValueError: nobody here can read such addresses.
    """
    if "://" in str(address):
        return Spool(str(address), process=process)
    return RunDir(pathlib.Path(address))


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
