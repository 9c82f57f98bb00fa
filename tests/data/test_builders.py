"""The six benchmarks from tiny archives in the official layouts; safety of archives and builds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest
import requests

from speciarl_jax.data.field_guide.builder import FieldGuide, FieldGuideConfig
from speciarl_jax.data.sources import archives, benchmarks, builder, layouts, releases
from speciarl_jax.data.sources.catalog import open_source
from tests.support import official

CASES = {
    "cub": (
        "cub",
        official.cub,
        {
            "train": ["Black footed Albatross", "Laysan Albatross", "American Crow"],
            "test": ["Black footed Albatross", "Laysan Albatross"],
        },
    ),
    "flowers": (
        "flowers",
        official.flowers,
        {
            "train": ["passion flower", "pink primrose"],
            "validation": ["wallflower", "blackberry lily"],
            "test": ["passion flower", "pink primrose", "wallflower", "pink-yellow dahlia"],
        },
    ),
    "food": (
        "food",
        official.food,
        {"train": ["apple pie", "apple pie", "sushi"], "test": ["apple pie", "sushi"]},
    ),
    "pets": (
        "pets",
        official.pets,
        {
            "train": ["Abyssinian", "american pit bull terrier"],
            "test": ["Abyssinian", "Maine Coon"],
        },
    ),
    "cars": (
        "cars",
        official.cars_devkit,
        {
            "train": ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"],
            "test": ["Ram C/V Cargo Van Minivan 2012", "AM General Hummer SUV 2000"],
        },
    ),
    "cars, nested": (
        "cars",
        functools.partial(official.cars_devkit, extra="cars_x/"),
        {
            "train": ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"],
            "test": ["Ram C/V Cargo Van Minivan 2012", "AM General Hummer SUV 2000"],
        },
    ),
    "cars, joint": (
        "cars",
        official.cars_joint,
        {
            "train": ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"],
            "test": ["Ram C/V Cargo Van Minivan 2012"],
        },
    ),
    "cars, folders": (
        "cars",
        official.cars_folders,
        {"train": ["AM General Hummer SUV 2000"], "test": ["AM General Hummer SUV 2000"]},
    ),
    "aircraft": (
        "aircraft",
        official.aircraft,
        {"train": ["707-320", "F/A-18"], "validation": ["Boeing 717"], "test": ["DR-400"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_builds_from_official_layout(case, tmp_path):
    name, make, expected = CASES[case]
    data_dir = tmp_path / "data"
    benchmarks.build(name, data_dir, make(tmp_path), allow_partial=True)
    ids = set()
    for split, labels in expected.items():
        source = open_source(name, split, data_dir)
        examples = [source[i] for i in range(len(source))]
        assert [e.ground_truth for e in examples] == labels == source.labels()
        assert all(e.image[:2] == b"\xff\xd8" for e in examples)
        assert {(e.dataset, e.split) for e in examples} == {(name, split)}
        ids |= {e.prompt_id for e in examples}
    assert len(ids) == sum(map(len, expected.values()))
    with pytest.raises(ValueError, match="does not exist"):
        open_source(name, "nonsense", data_dir)
    assert not (data_dir / builder.BUILDING).exists()


def test_official_numbers():
    """Images of the six, as their authors state them."""
    totals = {name: sum(b.counts.values()) for name, b in releases.BENCHMARKS.items()}
    assert totals == {
        "cub": 11_788,
        "flowers": 8_189,
        "food": 101_000,
        "pets": 7_349,
        "cars": 16_185,
        "aircraft": 10_000,
    }
    assert releases.BENCHMARKS["flowers"].coop_counts["test"] == 2_463
    for name in ("flowers", "food", "pets"):
        assert sum(releases.BENCHMARKS[name].coop_counts.values()) == totals[name]
    assert len(set(layouts.flower_names())) == 102
    files = [d for b in releases.BENCHMARKS.values() for d in b.downloads]
    assert [d.filename for d in files][:4] == [
        "CUB_200_2011.tgz",
        "102flowers.tgz",
        "imagelabels.mat",
        "setid.mat",
    ]
    assert [len(d.sha256) for d in files] == [64] * 7 + [0]
    assert sum(d.size for d in files) == 7_302_833_719


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("Boeing_717", "Boeing 717"),
        ("A310", "A310"),
        ("Dr. Pepper", "Dr. Pepper"),
        ("  beef__tartare ", "beef tartare"),
    ],
)
def test_clean_label(text, label):
    assert layouts.clean_label(text) == label


def test_whole_builds_need_official_counts_and_checksums(tmp_path):
    paths = official.aircraft(tmp_path)
    with pytest.raises(ValueError, match=r"found \{'train': 2.*officially \{'train': 3334"):
        benchmarks.build("aircraft", tmp_path / "data", paths)
    with pytest.raises(ValueError, match=r"SHA-256 .* is not the official .*--allow_partial"):
        benchmarks.build("cub", tmp_path / "data", official.cub(tmp_path))
    assert not any((tmp_path / "data").rglob("dataset_info.json"))


def test_missing_images_are_named(tmp_path):
    (path,) = official.aircraft(tmp_path)
    with tarfile.open(path) as pack:
        pack.extractall(tmp_path / "x", filter="data")
    next((tmp_path / "x").rglob("0062765.jpg")).unlink()
    folder = [str(tmp_path / "x")]
    with pytest.raises(ValueError, match=r"1 of 4 images are missing \(0062765.jpg\)"):
        benchmarks.build("aircraft", tmp_path / "data", folder)
    benchmarks.build("aircraft", tmp_path / "data", folder, allow_partial=True)
    assert len(open_source("aircraft", "train", tmp_path / "data")) == 2
    assert not (tmp_path / "data" / "aircraft" / "full").exists()


def test_build_again_reuses(tmp_path):
    paths = official.cub(tmp_path)
    first = benchmarks.build("cub", tmp_path / "data", paths, allow_partial=True)
    stamp = (first / "dataset_info.json").stat().st_mtime_ns
    again = benchmarks.build("cub", tmp_path / "data", ["gone.tgz"], allow_partial=True)
    assert again == first
    assert (first / "dataset_info.json").stat().st_mtime_ns == stamp


def test_same_archives_give_the_same_records(tmp_path):
    paths = official.food(tmp_path)
    digests = []
    for name in ("a", "b"):
        folder = benchmarks.build("food", tmp_path / name, paths, allow_partial=True)
        files = sorted(folder.glob("*array_record*"))
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in files])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("name", "paths", "message"),
    [
        ("cub", ["/nowhere/CUB.tgz"], "no such file"),
        ("cars", [], "official download is gone"),
        ("cub", ["README.tgz"], "damaged or not an archive"),
        ("cub", ["empty"], "images.txt is not in the given archives"),
        ("cars", ["empty"], "no known layout of Stanford Cars"),
    ],
)
def test_unusable_archives(name, paths, message, tmp_path):
    (tmp_path / "README.tgz").write_bytes(b"hello")
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / p) for p in paths]
    with pytest.raises(ValueError, match=message):
        benchmarks.build(name, tmp_path / "data", given, allow_partial=True)


def test_not_built_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="speciarl data build cub --data_dir"):
        open_source("cub", "train", tmp_path)


def _tar_with(path: pathlib.Path, info: tarfile.TarInfo, data: bytes = b"x") -> pathlib.Path:
    with tarfile.open(path, "w") as pack:
        info.size = len(data) if info.isreg() else 0
        pack.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_cannot_leave_the_target(name, kind, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    if kind == "tar":
        archive = _tar_with(tmp_path / "a.tar", tarfile.TarInfo(name))
    else:
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as pack:
            pack.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ValueError, match="outside the target"):
        archives.unpack(archive, target)
    assert [p.name for p in tmp_path.iterdir()] in (
        ["target", archive.name],
        [archive.name, "target"],
    )


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_not_made(kind, tmp_path):
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    target = tmp_path / "target"
    target.mkdir()
    assert archives.unpack(_tar_with(tmp_path / "a.tar", info), target) == 0
    assert not any(target.iterdir())


def test_archive_bombs_stop_early(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("zeros", b"\0" * 5_000_000)
    (tmp_path / "t").mkdir()
    with pytest.raises(ValueError, match="no data set"):
        archives.unpack(archive, tmp_path / "t", max_bytes=2_000_000)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_archives_are_damaged(keep, tmp_path):
    path = pathlib.Path(official.food(tmp_path)[0])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match="damaged"):
        benchmarks.build("food", tmp_path / "data", [path], allow_partial=True)
    assert not list((tmp_path / "data").rglob("*.json"))


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www on the loopback."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def _served(server, tmp_path, monkeypatch, sha256=None):
    """A benchmark with tiny official numbers whose downloads come from the loopback."""
    paths = official.flowers(tmp_path / "www")
    downloads = []
    for path in map(pathlib.Path, paths):
        digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        url = f"{server}/{path.name}"
        downloads.append(releases.Download(url, path.name, path.stat().st_size, digest))
    tiny = releases.Benchmark(
        "tiny_flowers",
        "tiny",
        tuple(downloads),
        layouts.read_flowers,
        {"train": 2, "validation": 2, "test": 4},
        5,
    )
    monkeypatch.setitem(releases.BENCHMARKS, "tiny_flowers", tiny)


def test_downloads_with_checksums(server, tmp_path, monkeypatch):
    _served(server, tmp_path, monkeypatch)
    folder = benchmarks.build("tiny_flowers", tmp_path / "data")
    assert folder.parent.name == "full"
    assert builder.is_built(folder)
    assert (tmp_path / "data" / "downloads").is_dir()


def test_wrong_download_is_refused(server, tmp_path, monkeypatch):
    _served(server, tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match="checksum"):
        benchmarks.build("tiny_flowers", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))


def test_no_connection_is_told_at_once_unless_all_is_there(server, tmp_path, monkeypatch):
    _served(server, tmp_path, monkeypatch)
    folder = benchmarks.build("tiny_flowers", tmp_path / "data")
    whole = releases.BENCHMARKS["tiny_flowers"]
    gone = [dataclasses.replace(d, url=f"http://127.0.0.1:9/{d.filename}") for d in whole.downloads]
    monkeypatch.setitem(
        releases.BENCHMARKS, "tiny_flowers", dataclasses.replace(whole, downloads=tuple(gone))
    )
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"download failed .*--archive=FILE"):
        benchmarks.build("tiny_flowers", tmp_path / "other")
    assert time.monotonic() - started < 10
    shutil.rmtree(folder)
    monkeypatch.setitem(releases.BENCHMARKS, "tiny_flowers", whole)
    shutil.rmtree(tmp_path / "www")  # built again from what was kept
    monkeypatch.setattr(requests, "get", None)
    assert builder.is_built(benchmarks.build("tiny_flowers", tmp_path / "data"))


def test_failed_download_is_one_line(server, tmp_path, monkeypatch):
    _served(server, tmp_path, monkeypatch)
    (tmp_path / "www" / "setid.mat").unlink()
    with pytest.raises(ValueError, match="download"):
        benchmarks.build("tiny_flowers", tmp_path / "data")


KILLED = """
import sys
from speciarl_jax.data.field_guide.builder import FieldGuide, FieldGuideConfig
from speciarl_jax.data.sources import builder
builder.prepare(FieldGuide, sys.argv[1], FieldGuideConfig.make("dogs", test=400))
"""


@pytest.mark.slow
def test_killed_build_leaves_nothing_that_looks_like_data(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*incomplete*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    config = FieldGuideConfig.make("dogs", test=400)
    assert not builder.is_built(tmp_path / builder.build_path(FieldGuide, config))
    assert any((tmp_path / builder.BUILDING).iterdir())
    small = FieldGuideConfig.make("dogs", test=4)
    assert builder.is_built(builder.prepare(FieldGuide, tmp_path, small))
    assert not (tmp_path / builder.BUILDING).exists()


def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"set data\.data_dir"):
        builder.prepare(FieldGuide, tmp_path / "file", FieldGuideConfig.make("dogs", test=1))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_disk_that_refuses_is_not_blamed_on_the_archive(kind, tmp_path, monkeypatch):
    """A full disk, played by the limit that a process may have on the size of its files."""
    archive, target = tmp_path / f"a.{kind}", tmp_path / "target"
    content = tmp_path / "big.bin"
    content.write_bytes(os.urandom(300_000))
    if kind == "tar":
        with tarfile.open(archive, "w") as pack:
            pack.add(content, "folder/big.bin")
    else:
        with zipfile.ZipFile(archive, "w") as pack:
            pack.write(content, "folder/big.bin")
    target.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*folder/big\.bin \(File too large\)"):
            archives.unpack(archive, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
