"""Rows on disk: round trip, bad lines named, a killed writer repaired, failures written again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl_jax.scoring.predictions import (
    Prediction,
    append_predictions,
    cut_half_line,
    from_rollout,
    parse_prediction,
    read_predictions,
    write_predictions,
)
from speciarl_jax.types import Category, Failure, FailureKind, Rollout, Verdict

ROW = Prediction(
    "birds/test/1", "birds", "thumbnails/1.jpg", "scarlet finch", "<answer>finch</answer>",
    "finch", Category.LESS_SPECIFIC, 1.0, 0,
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    rows = [
        ROW,
        dataclasses.replace(ROW, sample_index=1, prediction=None, category=None, reward=-1.0),
        dataclasses.replace(ROW, sample_index=2, category=None, reward=None, failure="timeout"),
        dataclasses.replace(ROW, step=3, advantage=-0.5, completion="\u2028 <script>\n\x00"),
    ]
    path = tmp_path / "a" / "predictions.jsonl"
    write_predictions(path, rows)
    assert read_predictions(path) == rows
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["category"] == "less_specific"
    assert "step" not in first


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives(text: str) -> None:
    row = dataclasses.replace(ROW, completion=text, ground_truth=text)
    line = json.dumps(row.to_json(), ensure_ascii=False).encode()
    assert parse_prediction(json.loads(line)) == row


def test_lone_surrogate_does_not_stop_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [dataclasses.replace(ROW, completion="a\ud800b")])
    assert read_predictions(path)[0].completion == "a?b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "best"}, "category 'best': expected one of"),
        ({"prediction": None}, "a format failure has no category"),
        ({"prediction": " \n"}, "a format failure has no category"),
        ({"sample_index": -1}, "field 'sample_index' is -1"),
        ({"sample_index": True}, "field 'sample_index' is True"),
        ({"reward": float("nan")}, "expected a finite number"),
        ({"reward": "1"}, "field 'reward' is '1'"),
        ({"completion": 5}, "field 'completion' is 5: expected a string"),
    ],
)
def test_bad_field_is_named_with_its_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "p.jsonl"
    good, bad = ROW.to_json(), ROW.to_json() | {"sample_index": 1} | change
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:3: ") as error:
        read_predictions(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_fields_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such predictions file"):
        read_predictions(tmp_path / "none.jsonl")
    path = tmp_path / "p.jsonl"
    path.write_text('{"dataset": "birds"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: field 'prediction' is missing"):
        read_predictions(path)
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: "):
        read_predictions(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_predictions(path)


def test_optional_fields_may_be_absent_and_unknown_ones_are_ignored() -> None:
    row = ROW.to_json() | {"mood": "good"}
    del row["image"], row["reward"]
    parsed = parse_prediction(row)
    assert (parsed.image, parsed.reward) == ("", None)
    del row["sample_index"]
    with pytest.raises(ValueError, match="field 'sample_index' is missing"):
        parse_prediction(row)


def test_every_cut_of_the_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    second = dataclasses.replace(ROW, sample_index=1, completion="façade")
    write_predictions(path, [ROW, second])
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        removed = cut_half_line(path)
        is_complete = end >= len(whole) - 1
        assert removed == (0 if is_complete else end - start)
        append_predictions(path, [dataclasses.replace(ROW, sample_index=2)])
        kept = [r.sample_index for r in read_predictions(path)]
        assert kept == ([0, 1, 2] if is_complete else [0, 2])


def test_reading_a_cut_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROW.to_json())[:-9])
    with pytest.raises(ValueError, match=r"p\.jsonl:1: .*cut short by a kill: --resume"):
        read_predictions(path)
    assert cut_half_line(tmp_path / "none.jsonl") == 0


def test_only_a_judge_failure_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    failed = dataclasses.replace(ROW, category=None, failure="timeout: judge")
    other = dataclasses.replace(ROW, sample_index=1)
    append_predictions(path, [failed, other])
    append_predictions(path, [failed])  # failed again
    append_predictions(path, [ROW])
    assert read_predictions(path) == [ROW, other]
    append_predictions(path, [ROW])
    with pytest.raises(ValueError, match=r"p\.jsonl:5: second row for 'birds/test/1' sample 0"):
        read_predictions(path)


def test_non_finite_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_predictions(tmp_path / "p", [dataclasses.replace(ROW, reward=float("inf"))])
    assert not (tmp_path / "p").exists()


def test_from_rollout() -> None:
    rollout = Rollout(
        "birds/test/1", "birds", "scarlet finch", 4, np.zeros(3, np.int32),
        np.zeros(3, np.float32), "text", "finch", is_truncated=False, reward=1.0, advantage=0.5,
    )  # fmt: skip
    rollout.outcome = Verdict(Category.LESS_SPECIFIC, "taxonomy")
    row = from_rollout(rollout, "thumbnails/1.jpg", step=7)
    assert (row.category, row.reward, row.step) == (Category.LESS_SPECIFIC, 1.0, 7)
    rollout.outcome = Failure(FailureKind.TIMEOUT, "no answer")
    row = from_rollout(rollout)
    assert row.is_judge_failure
    assert (row.reward, row.failure) == (None, "timeout: no answer")
    rollout.outcome, rollout.prediction, rollout.reward = None, None, -1.0
    row = from_rollout(rollout)
    assert row.is_format_failure
    assert row.reward == -1.0
