"""A folder of images, or a manifest that lists them, as a source.

Class folders: every folder that holds images is a class; the folders above it are coarser names,
which the offline judge reads as a taxonomy. Folders ``train``, ``validation`` (or ``val``) and
``test`` at the top are splits; without them a fixed part of every class is set aside for testing.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from speciarl_jax.data.sources.layouts import clean_label
from speciarl_jax.errors import NoSuchSplit
from speciarl_jax.types import IMAGE_SUFFIXES, Example, Taxon

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_UNREADABLE_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".eps")
_NAMES_SHOWN = 5
_LOG = logging.getLogger(__name__)
TEST_FRAC = 0.2  # of every class, set aside for testing if there are no splits
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
_IMAGE_COLUMNS = ("image", "image_path", "path", "file", "file_name", "filename")
_LABEL_COLUMNS = ("label", "ground_truth", "class", "class_name", "category", "species")


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One labelled file.

    Attributes:
        path: the file.
        key: unique within the source; relative path.
        labels: names from coarse to fine; the last is the ground truth.
        split: train, validation, test; "" if the source has no splits of its own.
    """

    path: pathlib.Path
    key: str
    labels: tuple[str, ...]
    split: str


class FileSource:
    """Labelled image files; bytes are read when asked for."""

    def __init__(self, dataset: str, split: str, files: list[ImageFile]) -> None:
        """Takes files that are already of this split."""
        self.dataset, self.split, self.files = dataset, split, files

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """The index-th image; a file that cannot be read has no bytes, and so is a bad image."""
        file = self.files[index]
        try:  # a pipe would be waited for without end
            data = file.path.read_bytes() if file.path.is_file() else b""
        except OSError:
            data = b""
        return Example(
            image=data,
            ground_truth=file.labels[-1],
            dataset=self.dataset,
            split=self.split,
            prompt_id=f"{self.dataset}/{self.split}/{file.key}",
            image_name=file.key,
        )

    def labels(self) -> list[str]:
        """Ground truth of every example, without reading images."""
        return [file.labels[-1] for file in self.files]

    def fingerprint(self) -> str:
        """Changes with names, labels, sizes and times of the files."""
        digest = hashlib.sha256(f"{self.dataset}/{self.split}".encode())
        for file in self.files:
            status = file.path.stat() if file.path.exists() else None
            stamp = (status.st_size, status.st_mtime_ns) if status else None
            digest.update(repr((str(file.path), file.labels, stamp)).encode())
        return digest.hexdigest()


def open_folder(path: str | pathlib.Path, split: str) -> FileSource:
    """Opens class folders or a manifest.

    A manifest is a ``.csv``, ``.jsonl`` or ``.parquet`` file with a column of image paths (relative
    to the file) and one of labels, perhaps one named ``split``.

    Raises:
        ValueError: nothing there, no images, columns missing, or no images in this split.
    """
    root = pathlib.Path(path)
    if not root.exists():
        raise ValueError(f"folder source {root}: no such file or folder")
    files = _read_manifest(root) if root.is_file() else _read_folders(root)
    if not files:
        raise ValueError(
            f"folder source {root}: no images; expected CLASS/IMAGE files ending in one of "
            f"{' '.join(IMAGE_SUFFIXES)}"
        )
    if not any(file.split for file in files):
        files = _divide(files)
    chosen = [file for file in files if file.split == split]
    if not chosen:
        known = ", ".join(sorted({file.split for file in files}))
        raise NoSuchSplit(f"folder source {root}: no images in split {split!r}; it has {known}")
    return FileSource(dataset_name(root), split, chosen)


def dataset_name(path: pathlib.Path) -> str:
    """Name of a folder or manifest, safe for ids and file names."""
    name = path.resolve().stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "folder"


def _read_folders(root: pathlib.Path) -> list[ImageFile]:
    """Images below class folders; whatever else lies there is counted in a warning."""
    files: list[ImageFile] = []
    left: dict[str, list[str]] = {}
    for folder, names in _walk(root, (), left):
        parts = folder.relative_to(root).parts
        split = SPLIT_NAMES.get(parts[0].lower(), "") if parts else ""
        labels = tuple(clean_label(part) for part in (parts[1:] if split else parts))
        for name in names:
            path, key = folder / name, "/".join((*parts, name))
            reason = _why_not(path, key, labels)
            if reason:
                left.setdefault(reason, []).append(key)
            else:
                files.append(ImageFile(path, key, labels, split))
    for reason, keys in sorted(left.items()):
        shown = ", ".join(map(ascii, keys[:_NAMES_SHOWN]))
        more = ", ..." if len(keys) > _NAMES_SHOWN else ""
        _warn_once(f"folder source {root}: {len(keys)} {reason}: {shown}{more}")
    return files


def _walk(
    folder: pathlib.Path, above: tuple[tuple[int, int], ...], left: dict[str, list[str]]
) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Folders and their file names, sorted; links are followed unless they lead back up.

    Args:
        folder: where to begin.
        above: identities of the folders on the way here.
        left: gets what is not entered, by reason.
    """
    status = folder.stat()
    above = (*above, (status.st_dev, status.st_ino))
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        left.setdefault("folders may not be read", []).append(str(folder))
        return
    below = [name for name in names if os.path.isdir(folder / name)]
    yield folder, [name for name in names if name not in set(below)]
    for name in below:
        path = folder / name
        status = path.stat()
        leads_up = folder.resolve().is_relative_to(path.resolve())
        if leads_up or (status.st_dev, status.st_ino) in above:
            reason = "links lead back to a folder above and are not followed"
            left.setdefault(reason, []).append(str(path))
        else:
            yield from _walk(path, above, left)


def _why_not(path: pathlib.Path, key: str, labels: tuple[str, ...]) -> str:
    """Why a file is no labelled image, as it is told of several; "" if it is one."""
    if not _is_utf8(key):
        return "files have names that are not UTF-8; rename them"
    suffix = path.suffix.lower()
    if suffix in _UNREADABLE_SUFFIXES:
        return f"{suffix} pictures cannot be decoded here; convert them to .jpg or .png"
    if suffix not in IMAGE_SUFFIXES:
        return "files are no pictures"
    if not os.path.isfile(path):
        return "names are no files (pipes, devices, broken links)"
    if not (labels and labels[-1]):
        return "pictures lie beside the class folders, without a label"
    return ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes that Python carries along as lone surrogates
        return False
    return True


@functools.cache
def _warn_once(line: str) -> None:
    """Each split of a folder reads all of it; what is left out is told once."""
    _LOG.warning(line)


def _read_manifest(file: pathlib.Path) -> list[ImageFile]:
    rows = _rows(file)
    if not rows:
        raise ValueError(f"manifest {file}: holds no rows")
    image = find_column(file, rows[0], _IMAGE_COLUMNS, "image path")
    label = find_column(file, rows[0], _LABEL_COLUMNS, "label")
    files: list[ImageFile] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if not row.get(image) or not row.get(label):
            raise ValueError(f"manifest {file}, row {number}: empty {image!r} or {label!r}")
        split = str(row.get("split") or "").lower()
        if split and split not in SPLIT_NAMES:
            raise ValueError(f"manifest {file}, row {number}: split {split!r} is unknown")
        key = str(row[image])
        if (first := seen.setdefault(key, number)) != number:
            raise ValueError(
                f"manifest {file}, rows {first} and {number}: both name {key!r}; list an image "
                "once, or it is in two splits or has two labels"
            )
        labels = (clean_label(str(row[label])),)
        files.append(ImageFile(file.parent / key, key, labels, SPLIT_NAMES.get(split, "")))
    return files


def _rows(file: pathlib.Path) -> list[dict[str, object]]:
    try:
        if file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as stream:
                return [dict(row) for row in csv.DictReader(stream)]
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is not an object")
            return rows
        if file.suffix == ".parquet":
            import pyarrow.parquet

            table: list[dict[str, object]] = pyarrow.parquet.read_table(file).to_pylist()
            return table
    except (
        ValueError,
        RecursionError,
        csv.Error,
    ) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"manifest {file}: cannot be read ({error})") from error
    raise ValueError(f"manifest {file}: expected one of {' '.join(MANIFEST_SUFFIXES)}")


def find_column(
    file: pathlib.Path, names: Iterable[object], candidates: tuple[str, ...], what: str
) -> str:
    """The first candidate among a table's column names.

    Raises:
        ValueError: none of them.
    """
    got = list(names)
    for name in candidates:
        if name in got:
            return name
    raise ValueError(
        f"{file}: no column for the {what}; expected one of {', '.join(candidates)}, got "
        f"{', '.join(map(str, got))}"
    )


def _divide(files: list[ImageFile]) -> list[ImageFile]:
    """Sets aside part of every class: the files whose hashed keys come first, never all of them."""
    by_class: dict[tuple[str, ...], list[ImageFile]] = {}
    for file in files:
        by_class.setdefault(file.labels, []).append(file)
    is_test: set[str] = set()
    for members in by_class.values():
        count = min(math.ceil(len(members) * TEST_FRAC), len(members) - 1)
        members.sort(key=lambda file: hashlib.sha256(file.key.encode()).digest())
        is_test.update(file.key for file in members[:count])
    return [
        dataclasses.replace(file, split="test" if file.key in is_test else "train")
        for file in files
    ]


def folder_taxonomy(path: str | pathlib.Path) -> list[Taxon]:
    """Nested class folders as a tree of names, for the offline judge (``judge.taxonomy``).

    Returns:
        Roots of ``{"name", "level", "children"}``, coarse to fine.

    Raises:
        ValueError: no images.
    """
    files = _read_folders(pathlib.Path(path))
    if not files:
        raise ValueError(f"folder source {path}: no images below class folders")
    roots: list[Taxon] = []
    for labels in sorted({file.labels for file in files}):
        level = roots
        for depth, name in enumerate(labels):
            node = next((node for node in level if node["name"] == name), None)
            if node is None:
                node = {"name": name, "level": f"level{depth + 1}", "children": []}
                level.append(node)
            level = node["children"]
    return roots
