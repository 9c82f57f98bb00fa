"""Work directories on object storage: written locally, copied at each save.

Object stores have no append and no SQLite, so a run with ``--workdir=gs://bucket/run`` works in a
local spool folder and `Spool.push` copies what changed. A run that goes on elsewhere starts with
`Spool.pull`. A copy that a kill cut short holds at worst one unfinished checkpoint, which resuming
detects and skips.
"""

from __future__ import annotations

import hashlib
import pathlib
import sqlite3
import tempfile

import fsspec

_SPOOL_ROOT = pathlib.Path("~/.cache/speciarl/spool")
_TRANSIENT = ("-wal", "-shm", ".tmp")  # SQLite's journals and half-written files


class Spool:
    """A local folder and the remote one that it is copied to."""

    def __init__(self, url: str, root: pathlib.Path = _SPOOL_ROOT) -> None:
        """Chooses the local folder; reads and writes nothing remote.

        Args:
            url: ``gs://bucket/path`` or another address that fsspec knows.
            root: where spool folders lie; each address has its own.

        Raises:
            ValueError: nobody here can read such addresses.
        """
        try:
            self._remote, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"--workdir={url}: cannot be opened ({error}); for gs:// install the extra `gcp`"
            ) from error
        self.url, self._path = url, path.rstrip("/")
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.local = root.expanduser() / name
        self.local.mkdir(parents=True, exist_ok=True)
        self._pushed: dict[str, tuple[int, int]] = {}

    def pull(self) -> int:
        """Copies the remote run into the local folder, over what is there; returns the files."""
        files = self._remote_files()
        for name in files:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._remote.get_file(f"{self._path}/{name}", str(target))
            self._pushed[name] = _stamp(target)
        return len(files)

    def push(self) -> int:
        """Copies new and changed files, deletes remote ones that are gone; returns the copies.

        Raises:
            OSError: the store refuses; nothing local is lost, the next push tries again.
        """
        found = {
            path.relative_to(self.local).as_posix(): _stamp(path)
            for path in sorted(self.local.rglob("*"))
            if path.is_file() and not path.name.endswith(_TRANSIENT)
        }
        changed = [name for name, stamp in found.items() if self._pushed.get(name) != stamp]
        for name in changed:
            self._put(name)
            self._pushed[name] = found[name]
        for name in [name for name in self._pushed if name not in found]:
            self._remote.rm_file(f"{self._path}/{name}")
            del self._pushed[name]
        return len(changed)

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


def is_remote(workdir: str | pathlib.Path) -> bool:
    """Whether a work directory is an address rather than a folder."""
    return "://" in str(workdir)


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
