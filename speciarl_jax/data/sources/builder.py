"""What all builders share: features, and a build that is whole or absent.

`prepare` builds in a temporary folder beside the target and renames at the end, so a killed build
leaves nothing that could be taken for data; what it leaves is removed by the next build.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from typing import ClassVar, TypeAlias

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from speciarl_jax.files import write_whole

BUILDING = ".building"
INDEX_FILE = "speciarl_index.json"
_LOG = logging.getLogger(__name__)


# Split names to their examples: (key, what `ImageBuilder`'s features hold).
Examples: TypeAlias = Iterator[tuple[str, dict[str, bytes | str]]]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc, call-arg]
    """Base of builders whose records are encoded image bytes, a cleaned label and a key.

    Bytes are stored as they come (no re-encoding, and no TensorFlow to decode them).
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look these up beside its own code, through a package it forgets to require.
    url_infos: ClassVar[dict[str, tfds.download.checksums.UrlInfo]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "label": tfds.features.Text(),
                    "name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # the official order; the loader shuffles
        )


def build_path(builder_class: type[ImageBuilder], config: tfds.core.BuilderConfig) -> pathlib.Path:
    """Where a finished build lives under the data directory: NAME/CONFIG/VERSION."""
    return pathlib.Path(builder_class.name, config.name, str(builder_class.VERSION))


def is_built(directory: pathlib.Path) -> bool:
    """Whether `directory` holds a finished build."""
    return (directory / "dataset_info.json").is_file()


def prepare(
    builder_class: type[ImageBuilder],
    data_dir: str | pathlib.Path,
    config: tfds.core.BuilderConfig,
) -> pathlib.Path:
    """Builds a data set unless it is there already; safe to call from several processes.

    Returns:
        Directory of the finished build, below `data_dir`.

    Raises:
        ValueError: the builder refuses its input, or `data_dir` cannot be written.
    """
    root = pathlib.Path(data_dir)
    path = build_path(builder_class, config)
    if is_built(root / path):
        return root / path
    try:
        (root / BUILDING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data_dir {root}: cannot be written ({error}); set data.data_dir"
        ) from error
    _LOG.info("building %s", root / path)
    with _scratch(root) as scratch, _quiet():
        builder = builder_class(data_dir=str(scratch), file_format="array_record", config=config)
        builder.download_and_prepare(
            download_dir=str(root / "downloads"),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
        _write_index(scratch / path)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(scratch / path, root / path)
        except OSError:
            if not is_built(root / path):  # otherwise another process was faster, and as good
                raise
    return root / path


def _write_index(directory: pathlib.Path) -> None:
    """Keeps names and labels beside the records, so that selections need not read images."""
    builder = tfds.builder_from_directory(str(directory))
    index: dict[str, dict[str, list[str]]] = {}
    for split in builder.info.splits:
        index[split] = {"names": [], "labels": []}
        for record in builder.as_data_source(split=split):
            index[split]["names"].append(record["name"].decode())
            index[split]["labels"].append(record["label"].decode())
    write_whole(directory / INDEX_FILE, json.dumps(index))


@contextlib.contextmanager
def _scratch(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder of this process under ROOT/.building, removed at the end, as are dead ones."""
    host = socket.gethostname()
    for left in (root / BUILDING).iterdir():
        owner, _, rest = left.name.rpartition("@")
        if owner == host and not _is_alive(rest.partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    scratch = root / BUILDING / f"{host}@{os.getpid()}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # another build is under way
            (root / BUILDING).rmdir()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints to standard output, which belongs to ``--json``; and bars only for terminals."""
    if sys.stderr.isatty():
        tfds.enable_progress_bar()
    else:
        tfds.disable_progress_bar()
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
