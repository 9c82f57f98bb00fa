"""`speciarl data ...` through its parser."""

from __future__ import annotations

import argparse
import json

import pytest
from PIL import Image

from speciarl_jax.cli import data
from tests.support import official


@pytest.fixture
def run(capsys, tmp_path):
    """Runs a command line with --data_dir; returns standard output."""

    def call(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        data.register(parser.add_subparsers(required=True))
        args = parser.parse_args(["data", *arguments, f"--data_dir={tmp_path / 'data'}"])
        assert args.handler(args) == 0
        return capsys.readouterr().out

    return call


def test_list_and_build(run, tmp_path):
    assert "not built" in run("list")
    archive = official.cub(tmp_path)[0]
    text = run("build", "cub", f"--archive={archive}", "--allow_partial")
    assert "train 3, test 2" in text
    assert run("build", "cub", f"--archive={archive}", "--allow_partial") == text
    listed = json.loads(run("list", "--json"))["sources"]
    (cub,) = [source for source in listed if source["name"] == "cub"]
    assert cub["is_built"]
    assert "partial" in cub["description"]


def test_several_archives(run, tmp_path):
    options = [f"--archive={path}" for path in official.pets(tmp_path)]
    content = json.loads(run("build", "pets", *options, "--allow_partial", "--json"))
    assert content["counts"] == {"pets": {"train": 2, "test": 2}}


def test_show_writes_a_sheet(run, tmp_path):
    out = tmp_path / "sheet.png"
    spec = "field_guide_dogs:test=10"
    content = json.loads(run("show", spec, f"--out={out}", "--count=6", "--json"))
    assert len(content["examples"]) == 6
    with Image.open(out) as sheet:
        assert sheet.width > 900
    assert "6 pictures" in run("show", spec, f"--out={out}", "--count=6")


def test_show_survives_bad_images(run, tmp_path):
    folder = tmp_path / "photos" / "Crow"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no")
    (folder / "b.png").write_bytes(official.jpeg(0))
    out = tmp_path / "sheet.png"
    run("show", f"folder:{folder.parent}", "--split=train", f"--out={out}")
    run("show", f"folder:{folder.parent}", "--split=test", f"--out={out}")
    assert out.is_file()


def test_stats(run, tmp_path):
    archive = official.food(tmp_path)[0]
    run("build", "food", f"--archive={archive}", "--allow_partial")
    splits = json.loads(run("stats", "food", "--json"))["splits"]
    assert splits["train"]["class_counts"] == {"apple pie": 2, "sushi": 1}
    assert splits["test"]["median_width_px"] == 40
    assert "2 classes" in run("stats", "food", "--split=train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "imagenet"], "expected one of cub"),
        (["show", "nothing"], "unknown: expected one of"),
        (["stats", "cub"], "speciarl data build cub"),
        (["show", "field_guide_dogs:test=2", "--out=/proc/x/y.png"], "cannot be written"),
    ],
)
def test_errors_are_one_line(arguments, message, run):
    with pytest.raises(ValueError, match=message) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
