"""`speciarl parity` end to end on a directory as a user has it: it passes, and it fails."""

from __future__ import annotations

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from speciarl_jax.cli import convert
from speciarl_jax.convert.parity.table import (
    CaseReport,
    ParityReport,
    kl_per_token,
    max_abs_error,
    max_rel_error,
    top1_agreement,
)


def run(*argv):
    parser = argparse.ArgumentParser()
    convert.register(parser.add_subparsers())
    args = parser.parse_args([str(part) for part in argv])
    return args.handler(args)


def test_a_sound_checkpoint_passes(hf_dir, tmp_path, capsys):
    run("convert", hf_dir, tmp_path / "orbax")
    capsys.readouterr()
    arguments = ["--candidate", tmp_path / "orbax", "--tolerance=2e-5", "--greedy=8", "--json"]
    assert run("parity", hf_dir, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert max(report["worst"].values()) <= 2e-5
    assert {case["num_images"] for case in report["cases"]} == {0, 1, 2}
    assert max(case["num_tokens"] for case in report["cases"]) >= 400
    assert all(case["top1"] == 1 and case["greedy_equal"] == 8 for case in report["cases"])


def _merge_order(path):
    """The four patches of a merged token in another order."""
    state = load_file(path / "model.safetensors")
    key = "visual.merger.mlp.0.weight"
    parts = state[key].chunk(4, dim=1)
    state[key] = torch.cat([parts[i] for i in (0, 2, 1, 3)], dim=1)
    save_file(state, path / "model.safetensors")


def _window_order(path):
    """Other windows than those that the weights were made for."""
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["window_size"] = 56
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "component"),
    [
        (_merge_order, "vision/merger"),
        pytest.param(_window_order, "vision/block_0 (window)", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_fails_and_says_where(hf_dir, tmp_path, capsys, damage, component):
    candidate = tmp_path / "damaged"
    shutil.copytree(hf_dir, candidate)
    damage(candidate)
    assert run("parity", hf_dir, "--candidate", candidate, "--greedy=0") == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert f"{component}: relative error" in printed
    assert "text only:" not in printed.split("FAIL")[1]  # what has no image is sound


def test_a_missing_image_is_one_clear_error(hf_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no such file"):
        run("parity", hf_dir, "--image", tmp_path / "nowhere.png")


def test_errors_are_relative_to_the_scale_of_the_tensor():
    theirs = np.array([[1e-9, -2.0], [0.5, 1.0]], np.float32)
    ours = theirs + np.array([[2e-5, 0], [0, 0]], np.float32)
    assert max_rel_error(ours, theirs) == pytest.approx(1e-5)
    assert max_abs_error(ours[:1], theirs) == float("inf")
    assert max_abs_error(np.full((2, 2), np.nan), theirs) == float("inf")


def test_kl_is_that_of_the_reference_against_ours():
    theirs, ours = np.log(np.array([[0.5, 0.5]])) + 3.0, np.log(np.array([[0.25, 0.75]])) - 7.0
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_per_token(ours, theirs)[0] == pytest.approx(expected)
    assert top1_agreement(np.array([[0, 1], [1, 0]]), np.array([[0, 2], [0, 3]])) == 0.5


def test_every_kind_of_difference_fails_the_report():
    good = CaseReport("p", 5, 1, True, True, 0.0, {}, {"text/logits": 1e-6}, 0.0, 0.0, 1.0, 8, 8)
    assert ParityReport("dir", 2e-5, (good,)).exit_code == 0
    for change in (
        {"has_equal_tokens": False},
        {"has_equal_positions": False},
        {"pixels_max_abs": 1e-3},
        {"max_rel": {"text/logits": 1e-3}},
        {"max_rel": {"text/logits": float("nan")}},
        {"kl_max": 1e-3},
        {"greedy_equal": 7},
    ):
        report = ParityReport("dir", 2e-5, (CaseReport(**(vars(good) | change)),))
        assert report.exit_code == 1
        assert len(report.failures) == 1
