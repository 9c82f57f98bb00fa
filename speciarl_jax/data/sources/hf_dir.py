"""A Hugging Face dataset directory on disk, read with pyarrow alone.

Two layouts: what ``Dataset.save_to_disk`` writes (``state.json`` and Arrow streams, perhaps one
folder per split), and a snapshot of a hub repository (``SPLIT-00000-of-00002.parquet`` files).
Arrow files are memory-mapped. Parquet cannot be read at random, so each split is written once as an
Arrow file under the data directory.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from speciarl_jax.data.sources.folder import SPLIT_NAMES, dataset_name, find_column
from speciarl_jax.data.sources.layouts import clean_label
from speciarl_jax.errors import NoSuchSplit
from speciarl_jax.files import read_json, whole_file
from speciarl_jax.types import Example, JsonValue

_SAVE_AGAIN = "save the data set again"
_LABEL_COLUMNS = (
    "label",
    "ground_truth",
    "class",
    "labels",
    "fine_label",
    "species",
    "variant",
    "category",
)


class HfSource:
    """Examples of one split, memory-mapped."""

    def __init__(
        self, dataset: str, split: str, files: list[pathlib.Path], names: list[str] | None
    ) -> None:
        """Maps Arrow streams or files; `names` of the classes if labels are numbers.

        Raises:
            ValueError: damaged files, or no columns for image and label.
        """
        self.dataset, self.split = dataset, split
        self._files, self._names = files, names
        self._table = pyarrow.concat_tables([_read_arrow(file) for file in files])
        self._image = _image_column(self._table.schema, files[0])
        self._label = find_column(files[0], self._table.schema.names, _LABEL_COLUMNS, "label")

    def __reduce__(self) -> tuple[type[HfSource], tuple[object, ...]]:
        """Pickles as its files, which are mapped again."""
        return HfSource, (self.dataset, self.split, self._files, self._names)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Example:
        """The index-th row."""
        image = self._table[self._image][index].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        name = str(image.get("path") or "") if isinstance(image, dict) else ""
        key = f"{index:07d}"
        return Example(
            image=data or b"",
            ground_truth=self._to_text(self._table[self._label][index].as_py()),
            dataset=self.dataset,
            split=self.split,
            prompt_id=f"{self.dataset}/{self.split}/{key}",
            image_name=pathlib.PurePosixPath(name).name or key,
        )

    def _to_text(self, value: object) -> str:
        if self._names is not None and isinstance(value, int) and 0 <= value < len(self._names):
            value = self._names[value]
        return clean_label(str(value))

    def labels(self) -> list[str]:
        """Ground truth of every row."""
        return [self._to_text(value) for value in self._table[self._label].to_pylist()]

    def fingerprint(self) -> str:
        """Changes with the files."""
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files]
        return hashlib.sha256(repr((self.dataset, self.split, stamps)).encode()).hexdigest()


def open_hf_dir(path: str | pathlib.Path, split: str, data_dir: pathlib.Path) -> HfSource:
    """Opens a split of a dataset directory; `data_dir` receives the Arrow copy of Parquet files.

    Raises:
        ValueError: no data of a known layout, no such split, or no usable columns.
    """
    root = pathlib.Path(path)
    arrow, parquet = _arrow_files(root), _parquet_files(root)
    found = arrow or parquet
    if not found:
        raise ValueError(
            f"{root}: no Hugging Face dataset; expected save_to_disk output or *.parquet files"
        )
    if split not in found:
        raise NoSuchSplit(f"{root}: split {split!r} does not exist; it has {', '.join(found)}")
    files = found[split]
    readable = files if arrow else [_to_arrow(files, data_dir)]
    names = _class_names_of(root, None if arrow else files[0])
    return HfSource(dataset_name(root), split, readable, names)


def _arrow_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    found: dict[str, list[pathlib.Path]] = {}
    for state in sorted([*root.glob("state.json"), *root.glob("*/state.json")]):
        folder = state.parent
        name = "train" if folder == root else SPLIT_NAMES.get(folder.name.lower(), folder.name)
        found[name] = [folder / file for file in _listed_files(state)]
    return found


def _listed_files(state: pathlib.Path) -> list[str]:
    """Names of the Arrow files of a split, which lie beside its ``state.json``.

    Raises:
        ValueError: it lists something else, or a file of another folder.
    """
    match read_json(state, _SAVE_AGAIN):
        case {"_data_files": [*items]}:
            names = [item.get("filename") if isinstance(item, dict) else None for item in items]
        case _:
            names = [None]
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name:
            raise ValueError(
                f"{state}: expected _data_files with the filename of each, a file of that folder; "
                f"{_SAVE_AGAIN}"
            )
    return [name for name in names if isinstance(name, str)]


def _parquet_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    found: dict[str, list[pathlib.Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        stem = re.split(r"[-_.]", file.stem.lower())[0]
        name = SPLIT_NAMES.get(stem) or SPLIT_NAMES.get(file.parent.name.lower(), "train")
        found.setdefault(name, []).append(file)
    return found


def _read_arrow(file: pathlib.Path) -> pyarrow.Table:
    try:
        source = pyarrow.memory_map(str(file))
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            return pyarrow.ipc.open_file(source).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: damaged Arrow file ({error})") from error


def _to_arrow(files: list[pathlib.Path], data_dir: pathlib.Path) -> pathlib.Path:
    """One Arrow file with the rows of several Parquet files; written once."""
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr(stamps).encode()).hexdigest()[:24]
    target = data_dir / "hf" / f"{key}.arrow"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        schema = pyarrow.parquet.read_schema(files[0])
        with whole_file(target) as partial, pyarrow.ipc.new_file(str(partial), schema) as writer:
            for file in files:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                    writer.write_batch(batch)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{files[0].parent}: damaged Parquet file ({error})") from error
    return target


def _image_column(schema: pyarrow.Schema, file: pathlib.Path) -> str:
    for field in schema:
        kind = field.type
        has_bytes = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if has_bytes or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            return str(field.name)
    raise ValueError(f"{file}: no column of images (bytes); it has {', '.join(schema.names)}")


def _class_names_of(root: pathlib.Path, parquet: pathlib.Path | None) -> list[str] | None:
    """Class names from ``dataset_info.json`` or from the metadata of a Parquet file."""
    features: JsonValue = {}
    if parquet is not None:
        raw = (pyarrow.parquet.read_schema(parquet).metadata or {}).get(b"huggingface", b"{}")
        about = json.loads(raw)
        info = about.get("info") if isinstance(about, dict) else None
        features = info.get("features") if isinstance(info, dict) else None
    else:
        for file in sorted([*root.glob("dataset_info.json"), *root.glob("*/dataset_info.json")]):
            features = read_json(file, _SAVE_AGAIN).get("features") or features
    columns = features if isinstance(features, dict) else {}
    for column in _LABEL_COLUMNS:
        entry = columns.get(column)
        names = entry.get("names") if isinstance(entry, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names) and names:
            return [str(name) for name in names]
        if names:
            raise ValueError(
                f"{root}: names of {column!r}: expected a list of texts; {_SAVE_AGAIN}"
            )
    return None
