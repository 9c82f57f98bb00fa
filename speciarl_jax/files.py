"""Small files that are whole or not there, and JSON whose damage is told in one line.

Everything that a kill may meet goes through `whole_file`: the content is written beside the file
and renamed over it. This module imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

FETCH_MODEL = "fetch or export the model directory again"  # what mends half a file of a model
PARTIAL = ".partial"  # the end of every half-written file's name


@contextlib.contextmanager
def whole_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path in the same folder to write to; on leaving, it becomes `path` at once.

    A kill, a full disk or an error at any moment leaves the old file. Several processes may write
    one file; the last to finish wins. A link stays a link; what is no ordinary file
    (``/dev/stdout``) is written directly.

    Args:
        path: the file; its folder must exist.

    Raises:
        OSError: it cannot be written; the file there is the old one.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None:  # of an open file: a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | pathlib.Path, content: str | bytes) -> None:
    """Writes a file at once, text as UTF-8; see `whole_file`.

    Raises:
        OSError: it cannot be written; the file there is the old one.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with whole_file(path) as partial:
        partial.write_bytes(data)


def name_when_whole(name: str) -> str:
    """The name a half-written file would have got; any other name as it is."""
    if not name.endswith(PARTIAL):
        return name
    return name.removesuffix(PARTIAL).rpartition(".")[0]


def read_json(path: str | pathlib.Path, remedy: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        remedy: what the reader of the error is to do, half a sentence.
        kind: what the content must be: dict, list, or both.

    Raises:
        ValueError: not JSON (cut short by a kill, for example), nested deeper than Python reads,
            or of another kind; one line with the path and the remedy.
        OSError: the file is not there or cannot be read.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # Unicode errors are ValueErrors too
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("an object" if one is dict else "a list" for one in kinds)
        raise ValueError(f"{path}: {type(content).__name__} where JSON holds {wanted}; {remedy}")
    return content
