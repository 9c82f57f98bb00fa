"""A prepared data set as a source: ArrayRecord files with an index of names and labels."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

from speciarl_jax.errors import NoSuchSplit
from speciarl_jax.files import read_json
from speciarl_jax.types import Example


class RecordSource:
    """Examples of a prepared data set, read one by one when asked for."""

    def __init__(self, directory: pathlib.Path, dataset: str, split: str) -> None:
        """Opens one split of a finished build, see `builder.prepare`.

        Raises:
            ValueError: no such split, or the files are damaged.
        """
        import tensorflow_datasets as tfds

        from speciarl_jax.data.sources.builder import INDEX_FILE

        builder = tfds.builder_from_directory(str(directory))
        if split not in builder.info.splits:
            known = ", ".join(sorted(builder.info.splits)) or "none"
            raise NoSuchSplit(f"{dataset}: split {split!r} does not exist; it has {known}")
        self.dataset, self.split = dataset, split
        self._directory = directory
        try:
            index = read_json(directory / INDEX_FILE, "half an index")[split]
            self._names, self._labels = list(index["names"]), list(index["labels"])
            self._records: Sequence[dict[str, bytes]] = builder.as_data_source(split=split)
            is_whole = len(self._records) == len(self._names) == len(self._labels)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory}: damaged ({error}); remove this folder and build it again"
            ) from error
        if not is_whole:
            raise ValueError(f"{directory}: incomplete; remove this folder and build it again")

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        """The index-th example of the files.

        Raises:
            ValueError: damaged files (records carry checksums).
        """
        name = self._names[index]
        try:
            image = self._records[index]["image"]
        except (RuntimeError, TypeError, OSError) as error:
            raise ValueError(
                f"{self._directory}: record {name} is damaged ({error}); remove this folder and "
                "build it again"
            ) from error
        return Example(
            image=image,
            ground_truth=self._labels[index],
            dataset=self.dataset,
            split=self.split,
            prompt_id=f"{self.dataset}/{self.split}/{name}",
            image_name=name,
        )

    def labels(self) -> list[str]:
        """Ground truth of every example, without reading images."""
        return list(self._labels)

    def names(self) -> list[str]:
        """Image name of every example, without reading images."""
        return list(self._names)

    def fingerprint(self) -> str:
        """Changes when the files do."""
        info = (self._directory / "dataset_info.json").read_bytes()
        key = f"{self.dataset}/{self.split}/{self._directory}/{self._names}{self._labels}"
        return hashlib.sha256(key.encode() + info).hexdigest()
