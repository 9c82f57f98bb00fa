"""Unpacking of archives that nobody has vouched for.

Nothing is written outside the target, no links or devices are created, and an archive that unpacks
to far more than a data set can be is refused before the disk is full.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

MAX_UNPACKED_BYTES = 64 * 2**30
MAX_MEMBERS = 2_000_000
_CHUNK_BYTES = 1 << 20
_READ_ERRORS = (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError)


def collect(paths: Iterable[str | pathlib.Path], target: pathlib.Path) -> list[pathlib.Path]:
    """Makes all given material available as folders.

    Archives (.tar, .tgz, .tar.gz, .tar.bz2, .tar.xz, .zip; told by content) are unpacked below
    `target`; directories are used where they are; other files are copied to `target`.

    Returns:
        Folders to search.

    Raises:
        ValueError: a path that does not exist, or an archive that is damaged or unsafe.
    """
    roots = [target]
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            roots.append(path)
        elif not path.is_file():
            raise ValueError(f"--archive={path}: no such file or directory")
        elif tarfile.is_tarfile(path) or zipfile.is_zipfile(path):
            unpack(path, target)
        elif path.name.endswith((".tgz", ".gz", ".tar", ".zip", ".bz2", ".xz")):
            raise ValueError(f"--archive={path}: damaged or not an archive; download it again")
        else:
            shutil.copy(path, target / path.name)
    return roots


def unpack(archive: pathlib.Path, target: pathlib.Path, max_bytes: int = MAX_UNPACKED_BYTES) -> int:
    """Unpacks regular files of a tar or zip archive into an existing `target`; counts them.

    Raises:
        ValueError: a member whose path would leave `target`, more than `max_bytes` of content, or
            a damaged archive.
        OSError: the disk refuses, because it is full for example; the archive is not to blame.
    """
    written = count = 0
    try:
        for name, stream in _members(archive):
            count += 1
            path = _inside(target, name, archive)
            with _Output(path, archive) as out:
                while chunk := stream.read(_CHUNK_BYTES):
                    written += len(chunk)
                    if written > max_bytes or count > MAX_MEMBERS:
                        raise ValueError(
                            f"archive {archive}: unpacks to more than {max_bytes} bytes or "
                            f"{MAX_MEMBERS} files; this is no data set"
                        )
                    out.write(chunk)
    except _WriteError as error:
        raise OSError(str(error)) from error
    except _READ_ERRORS as error:
        raise ValueError(f"archive {archive}: damaged ({error}); download it again") from error
    return count


class _WriteError(Exception):
    """The disk refuses what an archive holds; no OSError, which reading an archive raises too."""


class _Output:
    """A file that is written to, with its folders."""

    def __init__(self, path: pathlib.Path, archive: pathlib.Path) -> None:
        self._path, self._archive = path, archive

    def __enter__(self) -> _Output:
        with self._told():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        return self

    def write(self, chunk: bytes) -> None:
        """Appends."""
        with self._told():
            self._file.write(chunk)

    def __exit__(self, *_: object) -> None:
        with self._told():
            self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _WriteError(
                f"archive {self._archive}: cannot write {self._path} ({error.strerror}); free "
                "space there, or choose another --data_dir"
            ) from error


def _members(archive: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and stream of every regular file; links, devices and directories are passed over."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            for info in pack.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    with pack.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive, "r|*") as pack:
        for member in pack:
            content = pack.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


def _inside(target: pathlib.Path, name: str, archive: pathlib.Path) -> pathlib.Path:
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    path = target.joinpath(*parts)
    is_odd = not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or "\0" in name
    if is_odd or not path.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"archive {archive}: member {name!r} would be written outside the target")
    return path


def sha256_of(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class FileTree:
    """All files below some folders, found by the end of their path."""

    def __init__(self, roots: Iterable[pathlib.Path]) -> None:
        """Walks the folders once; links are not followed."""
        self._by_name: dict[str, list[pathlib.Path]] = {}
        for root in roots:
            for folder, _, names in os.walk(root):
                for name in names:
                    self._by_name.setdefault(name, []).append(pathlib.Path(folder, name))
        for paths in self._by_name.values():
            paths.sort(key=lambda path: (len(path.parts), path))

    def find(self, tail: str) -> pathlib.Path | None:
        """The file whose path ends with `tail` (whole components), nearest to the root; or None."""
        parts = pathlib.PurePosixPath(tail).parts
        for path in self._by_name.get(parts[-1], ()):
            if path.parts[-len(parts) :] == parts:
                return path
        return None

    def need(self, tail: str, hint: str) -> pathlib.Path:
        """As `find`.

        Raises:
            ValueError: there is none; `hint` says what to add.
        """
        path = self.find(tail)
        if path is None:
            raise ValueError(f"{tail} is not in the given archives; {hint}")
        return path

    def all_under(self, folder: str, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
        """Files with one of the suffixes that have `folder` among their parents, sorted."""
        return sorted(
            path
            for name, paths in self._by_name.items()
            if name.lower().endswith(suffixes)
            for path in paths
            if folder in path.parent.parts
        )
