"""CoOp splits: a file that the user owns divides all images of a benchmark anew."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from speciarl_jax.data.sources.records import RecordSource
from speciarl_jax.files import read_json
from speciarl_jax.types import Example

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class CoopSource:
    """The images of one CoOp split, taken from all official splits of a build."""

    def __init__(
        self,
        sources: Mapping[str, RecordSource],
        file: str | pathlib.Path,
        dataset: str,
        split: str,
    ) -> None:
        """Looks every image that `file` lists up by its name in `sources`, all official splits.

        The file is a ``split_zhou_*.json``: lists of [image path, label, class name] per split.

        Raises:
            ValueError: not such a file, or images that the build lacks.
        """
        self.dataset, self.split = dataset, split
        self._sources = dict(sources)
        self._file = pathlib.Path(file)
        listed = _read_split(self._file, split)
        where = {
            image_name: (name, index)
            for name, source in self._sources.items()
            for index, image_name in enumerate(source.names())
        }
        missing = [path for path in listed if path not in where]
        if missing:
            raise ValueError(
                f"split file {file}: {len(missing)} of {len(listed)} images are not in the built "
                f"{dataset} (such as {missing[0]}); is it the file of another data set?"
            )
        self._places = [where[path] for path in listed]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """The index-th image of the file's list; its id says that the split is CoOp's."""
        name, place = self._places[index]
        found = self._sources[name][place]
        return Example(
            image=found.image,
            ground_truth=found.ground_truth,
            dataset=self.dataset,
            split=self.split,
            prompt_id=f"{self.dataset}/coop-{self.split}/{found.image_name}",
            image_name=found.image_name,
        )

    def labels(self) -> list[str]:
        """Ground truth of every example, without reading images."""
        labels = {name: source.labels() for name, source in self._sources.items()}
        return [labels[name][index] for name, index in self._places]

    def fingerprint(self) -> str:
        """Changes with the build and the list."""
        parts = [source.fingerprint() for source in self._sources.values()]
        return f"{parts}/{self._places}/{self.split}"


def _read_split(file: pathlib.Path, split: str) -> list[str]:
    if not file.is_file():
        raise ValueError(f"split file {file}: not found; pass the benchmark's split_zhou_*.json")
    try:
        content: dict[str, list[list[str]]] = read_json(file, "fetch it again")
        listed = [str(row[0]) for row in content[_SPLITS[split]]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"split file {file}: expected lists of [image, label, class] under train, val and test "
            f"({error!r})"
        ) from error
    return listed
