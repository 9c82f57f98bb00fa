"""What the six benchmarks officially are: files, readers, numbers, and the checks against them.

Source of urls, sizes and checksums (``downloads.txt``): TFDS's ``url_checksums``. FGVC-Aircraft is
not in TFDS and its authors publish no SHA-256: counts alone vouch for it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from importlib import resources

from speciarl_jax.data.sources import layouts
from speciarl_jax.data.sources.archives import sha256_of

_NAMES_IN_ERROR = 5


@dataclasses.dataclass(frozen=True)
class Download:
    """A file that the benchmark's authors offer. `sha256` is empty if none is known."""

    url: str
    filename: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One data set: where it comes from, how to read it, and what a whole one holds.

    Attributes:
        name: source name.
        title: for people.
        downloads: official files; empty if the official download is gone.
        reader: archive contents to entries.
        counts: images per split of the official release.
        num_classes: classes of the official release.
        coop_counts: images per split of the CoOp split file, where the paper's code uses one.
    """

    name: str
    title: str
    downloads: tuple[Download, ...]
    reader: layouts.Reader
    counts: Mapping[str, int]
    num_classes: int
    coop_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _files(name: str) -> tuple[Download, ...]:
    """The lines ``NAME SIZE SHA256 URL`` of one benchmark; a SHA-256 of ``-`` is unknown."""
    text = (resources.files(__package__) / "downloads.txt").read_text(encoding="utf-8")
    return tuple(
        Download(url, url.rpartition("/")[2].partition("?")[0], int(size), sha256.strip("-"))
        for owner, size, sha256, url in map(str.split, text.splitlines())
        if owner == name
    )


_ALL = (
    Benchmark(
        "cub",
        "CUB-200-2011 birds",
        _files("cub"),
        layouts.read_cub,
        {"train": 5994, "test": 5794},
        200,
    ),
    Benchmark(
        "flowers",
        "Oxford Flowers 102",
        _files("flowers"),
        layouts.read_flowers,
        {"train": 1020, "validation": 1020, "test": 6149},
        102,
        {"train": 4093, "validation": 1633, "test": 2463},
    ),
    Benchmark(
        "food",
        "Food-101",
        _files("food"),
        layouts.read_food,
        {"train": 75_750, "test": 25_250},
        101,
        {"train": 50_500, "validation": 20_200, "test": 30_300},
    ),
    Benchmark(
        "pets",
        "Oxford-IIIT Pets",
        _files("pets"),
        layouts.read_pets,
        {"train": 3680, "test": 3669},
        37,
        {"train": 2944, "validation": 736, "test": 3669},
    ),
    Benchmark("cars", "Stanford Cars", (), layouts.read_cars, {"train": 8144, "test": 8041}, 196),
    Benchmark(
        "aircraft",
        "FGVC-Aircraft variants",
        _files("aircraft"),
        layouts.read_aircraft,
        {"train": 3334, "validation": 3333, "test": 3333},
        100,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def check_archives(benchmark: Benchmark, paths: Sequence[pathlib.Path]) -> None:
    """Compares official files, told by their names, with the official checksums.

    Raises:
        ValueError: another checksum.
    """
    known = {item.filename: item for item in benchmark.downloads if item.sha256}
    for path in paths:
        expected = known.get(path.name)
        if expected is None or not path.is_file():
            continue
        digest = sha256_of(path)
        if digest != expected.sha256:
            raise ValueError(
                f"{path}: SHA-256 {digest} is not the official {expected.sha256}; download it "
                "again, or pass --allow_partial to take it as it is"
            )


def check_splits(benchmark: Benchmark, splits: layouts.Splits, allow_partial: bool) -> None:
    """Compares what was found with the official numbers of images and classes.

    Raises:
        ValueError: files that are listed but missing, other counts; with `allow_partial` only if
            there is nothing at all.
    """
    entries = [entry for found in splits.values() for entry in found]
    present = sum(entry.path is not None for entry in entries)
    if not present:
        raise ValueError(f"{benchmark.name}: the archives hold none of its images")
    if allow_partial:
        return
    remedy = "; download it again, or pass --allow_partial to take what is there"
    missing = [entry.name for entry in entries if entry.path is None]
    if missing:
        names = ", ".join(missing[:_NAMES_IN_ERROR])
        raise ValueError(
            f"{benchmark.name}: {len(missing)} of {len(entries)} images are missing ({names}"
            f"{', ...' if len(missing) > _NAMES_IN_ERROR else ''}){remedy}"
        )
    counts = {split: len(found) for split, found in splits.items()}
    if counts != dict(benchmark.counts):
        raise ValueError(
            f"{benchmark.name}: found {counts} images, officially {dict(benchmark.counts)}{remedy}"
        )
    classes = len({entry.label for entry in entries})
    if classes != benchmark.num_classes:
        raise ValueError(
            f"{benchmark.name}: found {classes} classes, officially {benchmark.num_classes}{remedy}"
        )
