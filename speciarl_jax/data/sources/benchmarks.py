"""The six benchmarks as TFDS builders without TensorFlow.

TFDS has builders for five of them, but all unpack archives through TensorFlow, most decode images
with it, and none takes an archive that is already there. These use TFDS for downloads, checksums
and ArrayRecord files, store image bytes as they come, with a cleaned label, and compare counts with
the official numbers (`releases`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import requests
import tensorflow_datasets as tfds

from speciarl_jax.data.sources import builder, layouts
from speciarl_jax.data.sources.archives import FileTree, collect
from speciarl_jax.data.sources.releases import (
    BENCHMARKS,
    Benchmark,
    check_archives,
    check_splits,
)

_REACH_S = 20.0  # seconds to wait for a host's first byte
_DOWNLOAD_ERRORS = (
    OSError,  # those of `requests` are OSErrors
    tfds.core.download.util.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
)


@dataclasses.dataclass(eq=False)
class BenchmarkConfig(tfds.core.BuilderConfig):  # type: ignore[misc]
    """What to build from which local files or folders; none for a download."""

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
    """Links in `folder` with the official names to files that TFDS fetched, checked and keeps."""
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
    """One short request: TFDS repeats a hopeless download for minutes without a word."""
    kept = list((folder / benchmark.name).glob("*.INFO"))
    if len(kept) < len(benchmark.downloads):
        with requests.get(benchmark.downloads[0].url, stream=True, timeout=_REACH_S):
            pass


def build(
    name: str,
    data_dir: pathlib.Path,
    paths: Sequence[str | pathlib.Path] = (),
    allow_partial: bool = False,
) -> pathlib.Path:
    """Builds a benchmark unless it is there, from archives or folders, or by download.

    A build with `allow_partial` takes missing images, other counts and checksums, and is kept apart
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
