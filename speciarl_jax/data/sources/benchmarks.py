"""The six benchmarks as TFDS builders without TensorFlow.

TFDS has builders for five of them, but all unpack archives through TensorFlow, most decode images
with it, and none takes an archive that is already there. These use TFDS for downloads, checksums
and ArrayRecord files, store image bytes as they come, with a cleaned label, and compare counts with
the official numbers.

Source of urls, sizes and checksums: TFDS's ``url_checksums``. FGVC-Aircraft is not in TFDS and its
authors publish no SHA-256: counts alone vouch for it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import requests
import tensorflow_datasets as tfds

from speciarl_jax.data.sources import builder, layouts
from speciarl_jax.data.sources.archives import FileTree, collect, sha256_of

_NAMES_IN_ERROR = 5
_REACH_S = 20.0  # seconds to wait for a host's first byte
_DOWNLOAD_ERRORS = (
    OSError,  # those of `requests` are OSErrors
    tfds.core.download.util.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
)


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


_FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
_PETS_URL = "https://thor.robots.ox.ac.uk/~vgg/data/pets/"

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "cub",
            "CUB-200-2011 birds",
            (
                Download(
                    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                    "CUB_200_2011.tgz",
                    1_150_585_339,
                    "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                ),
            ),
            layouts.read_cub,
            {"train": 5994, "test": 5794},
            200,
        ),
        Benchmark(
            "flowers",
            "Oxford Flowers 102",
            (
                Download(
                    _FLOWERS_URL + "102flowers.tgz",
                    "102flowers.tgz",
                    344_862_509,
                    "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
                ),
                Download(
                    _FLOWERS_URL + "imagelabels.mat",
                    "imagelabels.mat",
                    502,
                    "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
                ),
                Download(
                    _FLOWERS_URL + "setid.mat",
                    "setid.mat",
                    14_989,
                    "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
                ),
            ),
            layouts.read_flowers,
            {"train": 1020, "validation": 1020, "test": 6149},
            102,
            {"train": 4093, "validation": 1633, "test": 2463},
        ),
        Benchmark(
            "food",
            "Food-101",
            (
                Download(
                    "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                    "food-101.tar.gz",
                    4_996_278_331,
                    "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
                ),
            ),
            layouts.read_food,
            {"train": 75_750, "test": 25_250},
            101,
            {"train": 50_500, "validation": 20_200, "test": 30_300},
        ),
        Benchmark(
            "pets",
            "Oxford-IIIT Pets",
            (
                Download(
                    _PETS_URL + "images.tar.gz",
                    "images.tar.gz",
                    791_918_971,
                    "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
                ),
                Download(
                    _PETS_URL + "annotations.tar.gz",
                    "annotations.tar.gz",
                    19_173_078,
                    "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
                ),
            ),
            layouts.read_pets,
            {"train": 3680, "test": 3669},
            37,
            {"train": 2944, "validation": 736, "test": 3669},
        ),
        Benchmark(
            "cars",
            "Stanford Cars",
            (),
            layouts.read_cars,
            {"train": 8144, "test": 8041},
            196,
        ),
        Benchmark(
            "aircraft",
            "FGVC-Aircraft variants",
            (
                Download(
                    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
                    "fgvc-aircraft-2013b.tar.gz",
                    "fgvc-aircraft-2013b.tar.gz",
                    0,
                    "",
                ),
            ),
            layouts.read_aircraft,
            {"train": 3334, "validation": 3333, "test": 3333},
            100,
        ),
    )
}


@dataclasses.dataclass(eq=False)
class BenchmarkConfig(tfds.core.BuilderConfig):  # type: ignore[misc]
    """What to build from what.

    Attributes:
        benchmark: which data set.
        archives: local files or folders; empty for a download.
        allow_partial: take what is there, counts and checksums aside.
    """

    benchmark: Benchmark = BENCHMARKS["cub"]
    archives: tuple[str, ...] = ()
    allow_partial: bool = False


class BenchmarkBuilder(builder.ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Unpacks or downloads, checks, and writes one benchmark."""

    BUILDER_CONFIGS = ()

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, builder.Examples]:
        config = self.builder_config
        scratch = pathlib.Path(self._data_dir_root)
        paths = [pathlib.Path(path) for path in config.archives]
        if not paths:
            paths = _download(config.benchmark, dl_manager, scratch / "downloaded")
        elif not config.allow_partial:
            check_archives(config.benchmark, paths)
        unpacked = scratch / "unpacked"
        unpacked.mkdir()
        tree = FileTree(collect(paths, unpacked))
        splits = config.benchmark.reader(tree)
        check_splits(config.benchmark, splits, config.allow_partial)
        return {
            split: self._generate_examples(entries)
            for split, entries in splits.items()
            if any(entry.path is not None for entry in entries)
        }

    def _generate_examples(self, entries: Sequence[layouts.Entry]) -> builder.Examples:
        for entry in entries:
            if entry.path is not None:
                data = entry.path.read_bytes()
                yield entry.name, {"image": data, "label": entry.label, "name": entry.name}


def _download(
    benchmark: Benchmark, dl_manager: tfds.download.DownloadManager, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Downloads with TFDS, which checks SHA-256 and keeps finished files under DATA_DIR/downloads.

    Returns:
        Links in `folder` with the official names, which TFDS mangles.

    Raises:
        ValueError: no official download, no connection, or another checksum.
    """
    if not benchmark.downloads:
        raise ValueError(
            f"{benchmark.name}: the official download is gone; pass --archive=FILE_OR_FOLDER"
        )
    folder.mkdir()
    try:
        _reach_missing(benchmark, pathlib.Path(dl_manager.download_dir))
        found = dl_manager.download({item.filename: item.url for item in benchmark.downloads})
    except _DOWNLOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{benchmark.name}: download failed ({reason}); try again, or pass --archive=FILE"
        ) from error
    links = [folder / item.filename for item in benchmark.downloads]
    for link in links:
        link.symlink_to(pathlib.Path(found[link.name]).resolve())
    return links


def _reach_missing(benchmark: Benchmark, folder: pathlib.Path) -> None:
    """One short request: TFDS repeats a hopeless download for minutes without a word.

    Nothing is asked if TFDS has kept every file of an earlier build.

    Raises:
        OSError: no such host, or no connection to it. What the host answers is left to TFDS.
    """
    kept = list((folder / benchmark.name).glob("*.INFO"))
    if len(kept) < len(benchmark.downloads):
        with requests.get(benchmark.downloads[0].url, stream=True, timeout=_REACH_S):
            pass


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


def build(
    name: str,
    data_dir: pathlib.Path,
    paths: Sequence[str | pathlib.Path] = (),
    allow_partial: bool = False,
) -> pathlib.Path:
    """Builds a benchmark unless it is there; see `builder.prepare`.

    Args:
        name: key of `BENCHMARKS`.
        data_dir: root of prepared data.
        paths: archives or folders; empty to download.
        allow_partial: accept missing images, other counts and checksums. Such a build is kept apart
            from whole ones.

    Raises:
        ValueError: see `check_splits`, `check_archives`, `archives.collect`.
    """
    benchmark = BENCHMARKS[name]
    found = finished(name, data_dir)
    if found is not None and (allow_partial or found.parent.name == "full"):
        return found
    config = BenchmarkConfig(
        name="partial" if allow_partial else "full",
        benchmark=benchmark,
        archives=tuple(str(path) for path in paths),
        allow_partial=allow_partial,
    )
    infos = {
        item.url: tfds.download.checksums.UrlInfo(item.size, item.sha256, item.filename)
        for item in benchmark.downloads
        if item.sha256
    }
    named = type(
        "Named", (BenchmarkBuilder,), {"name": name, "url_infos": infos}, skip_registration=True
    )
    return builder.prepare(named, data_dir, config)


def finished(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """Directory of a finished build, a whole one before a partial one; None if there is none."""
    for kind in ("full", "partial"):
        path = data_dir / name / kind / str(BenchmarkBuilder.VERSION)
        if builder.is_built(path):
            return path
    return None
