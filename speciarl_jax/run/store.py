"""The few things a run asks of a store of objects, whatever it fails with told as an OSError."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from fsspec import AbstractFileSystem

# What clients raise that is no OSError: (module, class). They are looked for only if the module was
# imported, for without it nothing can have raised them.
_OWN_ERRORS = (
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("aiohttp", "ClientError"),
)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Errors of a client of a store as OSError, one line with the object's name."""
    loaded = ((sys.modules[module], name) for module, name in _OWN_ERRORS if module in sys.modules)
    own = tuple(getattr(module, name) for module, name in loaded)
    try:
        yield
    except OSError:
        raise
    except own as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path}: the store refuses ({reason[:200]})") from error


class Store:
    """Objects by their path, through fsspec.

    Every method raises FileNotFoundError where there is no such object, and OSError for whatever
    else the store or the way there fails with.
    """

    def __init__(self, files: AbstractFileSystem) -> None:
        """Takes an open file system of fsspec."""
        self._files = files

    def exists(self, path: str) -> bool:
        """Whether there is an object, or one below."""
        with _told(path):
            return bool(self._files.exists(path))

    def find(self, path: str) -> list[str]:
        """Names of all objects below."""
        with _told(path):
            return [str(name) for name in self._files.find(path)]

    def read(self, path: str) -> bytes:
        """Content of an object."""
        with _told(path):
            content: bytes = self._files.cat_file(path)
        return content

    def write(self, path: str, content: bytes) -> None:
        """Makes or replaces an object."""
        with _told(path):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content)

    def get_file(self, path: str, target: str) -> None:
        """Copies an object to a local file."""
        with _told(path):
            self._files.get_file(path, target)

    def put_file(self, source: str, path: str) -> None:
        """Copies a local file to an object."""
        with _told(path):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.put_file(source, path)

    def delete(self, path: str, *, recursive: bool = False) -> None:
        """Deletes an object, or all below a path."""
        with _told(path):
            self._files.rm(path, recursive=recursive)
