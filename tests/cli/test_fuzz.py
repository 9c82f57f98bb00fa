"""Odd words, odd files: whatever the command line is given, no traceback and one line of error.

Each class of fault has its cases; `told` runs a command line in this process and fails on anything
that `main` lets through.
"""

import json
import math
import pathlib
import re
import shutil

import pyarrow as pa
import pytest
from PIL import Image

from speciarl_jax.arch import Arch
from speciarl_jax.cli.main import main
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.data.images import ImageLimits

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = f"--config={ROOT / 'configs' / 'cpu_smoke.py'}"
DEEP = "[" * 100_000
ROW = {
    "prompt_id": "a/b", "dataset": "d", "ground_truth": "x", "completion": "<answer>x</answer>",
    "prediction": "x", "category": "specific", "reward": 1.0, "sample_index": 0,
}  # fmt: skip
SCORED = "eval/base/predictions.jsonl"
ESTIMATE = {"value": 1.0, "low": 0.5, "high": 1.0}
SCORES = {"n": 1, "correctness": ESTIMATE, "specificity": ESTIMATE, "hm": ESTIMATE}


def told(capsys, *words) -> tuple[int, str]:
    """(exit code, last line of standard error)."""
    code = main([str(word) for word in words])
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    return code, err.splitlines()[-1] if err else ""


def run_of(tmp_path, files) -> pathlib.Path:
    for name, text in files.items():
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "run").mkdir(exist_ok=True)
    return tmp_path / "run"


def metrics(**parts):
    row = json.dumps(ROW) + "\n"
    return {
        SCORED: row,
        "eval/base/metrics.json": json.dumps({"datasets": {}, "averages": {}} | parts),
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no rows in metrics.jsonl"),
        ({"metrics.jsonl": ""}, "no rows in metrics.jsonl"),
        ({SCORED: ""}, "no rows in metrics.jsonl"),
        ({"metrics.jsonl": f'{DEEP}\n{{"step": 1, "a": 1}}\n'}, "metrics.jsonl:1: "),
        ({"metrics.jsonl": '[1]\n{"step": 1}\n'}, "metrics.jsonl:1: expected a JSON object"),
        ({"metrics.jsonl": '{"step": -1}\n\n'}, "metrics.jsonl:1: expected .* of 0 or more"),
        ({"metrics.jsonl": '{"step": true}\n\n'}, "metrics.jsonl:1: expected"),
        ({"metrics.jsonl": '{"step": 1.5}\n\n'}, "metrics.jsonl:1: expected"),
        ({"config.json": DEEP, "metrics.jsonl": '{"step": 1}\n'}, "config.json: not valid JSON"),
        ({"config.json": "[]", "metrics.jsonl": '{"step": 1}\n'}, "config.json: list where"),
        ({SCORED: f"{DEEP}\n"}, "predictions.jsonl:1: "),
        ({SCORED: "[]\n"}, "predictions.jsonl:1: expected a JSON object"),
        ({SCORED: json.dumps(ROW | {"reward": 10**400}) + "\n"}, "'reward' is 1000.*a finite"),
        (metrics(datasets=[]), "metrics.json: datasets: expected an object, got list"),
        (metrics(averages={"all": 3}), "averages/all: expected an object, got int"),
        (metrics(datasets={"d": {"hm": ESTIMATE}}), "datasets/d/n: expected a number of answers"),
        (metrics(datasets={"d": SCORES | {"hm": None}}), "datasets/d/hm: expected an object with"),
        (
            metrics(datasets={"d": SCORES | {"hm": ESTIMATE | {"value": "x"}}}),
            "datasets/d/hm/value='x': expected a number or null; delete the file and score again",
        ),
    ],
)
def test_a_report_of_odd_files_names_the_file(tmp_path, capsys, files, message):
    run = run_of(tmp_path, files)
    code, line = told(capsys, "report", run, f"--out={tmp_path / 'page.html'}")
    assert code == 2
    assert re.search(message, line), line
    assert not (tmp_path / "page.html").exists()


def test_a_number_beyond_any_float_is_left_out(tmp_path, capsys):
    text = f'{{"step": 1, "reward/mean": {"9" * 400}}}\n{{"step": 2, "reward/mean": 0.5}}\n'
    run = run_of(tmp_path, {"metrics.jsonl": text})
    assert told(capsys, "report", run, f"--out={tmp_path / 'page.html'}")[0] == 0


@pytest.mark.parametrize("text", ["", "\n\n", "\0\xff", "[]", "null", "[1, 2]", DEEP, '{"a": 1}'])
def test_a_file_of_pairs_without_a_pair_is_no_success(tmp_path, capsys, text):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    pairs.write_bytes(text.encode("latin-1"))
    for words in (["label", pairs, f"--out={out}"], ["eval", pairs]):
        code, line = told(capsys, "judge", *words)
        assert code == 2
        assert str(pairs) in line
    assert not out.exists()


@pytest.mark.parametrize("action", ["stats", "export", "purge"])
def test_an_empty_cache_file_is_no_cache(tmp_path, capsys, action):
    cache = tmp_path / "cache.sqlite"
    cache.touch()
    code, line = told(capsys, "judge", "cache", action, cache, f"--file={tmp_path / 'out'}")
    assert (code, "an empty file" in line) == (1, True)
    assert cache.stat().st_size == 0


@pytest.mark.parametrize(
    "setting",
    [f"{name}={value}" for name in ("timeout_s", "backoff_s", "backoff_max_s", "pause_budget_s")
     for value in ("inf", "nan", "-1", "0", "1e400")],
)  # fmt: skip
def test_seconds_of_the_judge_are_finite(capsys, setting):
    code, line = told(capsys, "judge", "check", "--set", setting)
    assert code == 2
    assert f"judge.{setting.partition('=')[0]}=" in line
    code, line = told(capsys, "check", SMOKE, f"--config.judge.{setting}")
    assert code == 2
    assert f"judge.{setting.partition('=')[0]}=" in line


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "9" * 30, "x", "1e3", "", "8000.0"])
def test_a_port_is_one(capsys, port):
    code, line = told(capsys, "judge", "serve", f"--port={port}")
    assert code == 2
    assert "expected a port from 0 to 65535" in line or "--port: invalid int value" in line


@pytest.mark.parametrize(
    "options", ["train=inf", "train=nan", "train=-5", "train=1.5", "train=1e300", "seed=-1",
                "hard_frac=7", "hard_frac=nan", "train=x", "moon=3"],
)  # fmt: skip
def test_options_of_the_field_guide_are_whole_numbers(tmp_path, capsys, options):
    spec = f"field_guide_birds:{options}"
    code, line = told(capsys, "data", "show", spec, f"--data_dir={tmp_path}")
    assert code == 2
    assert "field guide option 'moon'" in line or f"{spec}: {options!r}" in line


@pytest.mark.parametrize(
    "words",
    [
        ["show", "field_guide_birds:train=2,test=2", "--count=-1"],
        ["stats", "field_guide_birds:train=2,test=2", "--sizes=-1"],
        ["stats", "field_guide_birds:train=2,test=2", "--seed=-1"],
        ["show", "field_guide_birds:train=2,test=2", "--seed=99999999999999999999"],
    ],
)
def test_counts_are_natural_numbers(tmp_path, capsys, words):
    code, line = told(capsys, "data", *words, f"--data_dir={tmp_path}")
    assert (code, "expected a whole number of 0 or more" in line) == (2, True)


@pytest.mark.parametrize("verb", ["train", "check", "eval"])
@pytest.mark.parametrize("workdir", ["", " "])
def test_an_empty_work_directory_is_not_the_current_one(
    tmp_path, monkeypatch, capsys, verb, workdir
):
    monkeypatch.chdir(tmp_path)
    code, line = told(capsys, verb, SMOKE, f"--workdir={workdir}")
    assert (code, "expected a folder or an address" in line) == (2, True)
    assert list(tmp_path.iterdir()) == []


# --- data sets ----------------------------------------------------------------------------------

LISTED = '{"_data_files": [{"filename": "g.arrow"}], "_split": "train"}'


def arrow_bytes() -> bytes:
    """One picture (which it is not) with label 0."""
    table = pa.table({"image": [{"bytes": b"x", "path": "a"}], "label": [0]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("state.json", t) for t in ("", "[]", "null", "3", DEEP, "{}", "\0\xff")],
        ("state.json", '{"_data_files": 3}'),
        ("state.json", '{"_data_files": ["g.arrow"]}'),
        ("state.json", '{"_data_files": [{}]}'),
        ("state.json", '{"_data_files": [{"filename": 3}]}'),
        ("state.json", '{"_data_files": [{"filename": ""}]}'),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": "../hf/g.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}'),
        *[("dataset_info.json", t) for t in ("", "[]", "null", "3", DEEP, "\0\xff")],
        ("dataset_info.json", '{"features": {"label": {"names": 3}}}'),
        ("dataset_info.json", '{"features": {"label": {"names": [1, 2]}}}'),
        ("g.arrow", ""),
        ("g.arrow", "junk"),
    ],
)
def test_an_odd_dataset_directory_is_named(tmp_path, capsys, name, text):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "state.json").write_text(LISTED)
    (folder / "g.arrow").write_bytes(arrow_bytes())
    (folder / name).write_bytes(text.encode("latin-1"))
    words = ["--split=train", f"--data_dir={tmp_path / 'd'}", f"--out={tmp_path / 'sheet.png'}"]
    code, line = told(capsys, "data", "show", f"hf:{folder}", *words)
    assert (code, str(folder) in line) in ((2, True), (1, True)), line


@pytest.mark.parametrize("text", ['{"features": 3}', '{"features": {"label": 3}}', "{}"])
def test_a_dataset_without_class_names_has_numbers(tmp_path, capsys, text):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in {"state.json": LISTED, "dataset_info.json": text}.items():
        (folder / name).write_text(content)
    (folder / "g.arrow").write_bytes(arrow_bytes())
    words = ["--split=train", f"--data_dir={tmp_path / 'd'}", f"--out={tmp_path / 'sheet.png'}"]
    assert told(capsys, "data", "show", f"hf:{folder}", *words)[0] == 0


@pytest.mark.parametrize("text", ["", "[]\n", "null\n", DEEP + "\n", "{}\n", '{"image": 1}\n'])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_odd_manifest_is_named(tmp_path, capsys, suffix, text):
    file = tmp_path / f"list.{suffix}"
    file.write_text(text)
    words = ["--split=train", f"--data_dir={tmp_path / 'd'}", f"--out={tmp_path / 'sheet.png'}"]
    code, line = told(capsys, "data", "show", f"folder:{file}", *words)
    assert (code, str(file) in line) == (2, True), line


# --- model directories --------------------------------------------------------------------------


def model_with(tmp_path, name, text) -> pathlib.Path:
    folder = tmp_path / "model"
    shutil.copytree(shipped_tiny_dir(), folder)
    (folder / name).write_text(text)
    return folder


FIELDS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
          "rms_norm_eps", "rope_scaling", "vision_config", "image_token_id")  # fmt: skip


@pytest.mark.parametrize("value", ["x", -1, [], {}, math.inf, [3], True])
@pytest.mark.parametrize("field", FIELDS)
def test_an_odd_architecture_is_named(field, value):
    content = json.loads((shipped_tiny_dir() / "config.json").read_text())
    place = content if field in content else content["text_config"]
    place[field] = value
    with pytest.raises(ValueError, match=r"config\.json: |architecture: ") as found:
        Arch.from_hf(content)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "3", DEEP])
def test_a_damaged_model_directory_is_named(tmp_path, capsys, name, text):
    folder = model_with(tmp_path, name, text)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    code, line = told(capsys, "sample", f"--model={folder}", f"--image={image}")
    assert (code, str(folder / name) in line) == (2, True), line


@pytest.mark.parametrize(
    "content",
    [
        {"size": 3}, {"size": {"shortest_edge": "x"}}, {"min_pixels": [1]}, {"image_mean": 3},
        {"image_mean": [1]}, {"image_std": [0, 0, 0]}, {"image_std": [1, "x", 1]},
        {"max_pixels": 1e400}, {"min_pixels": -5},
    ],
)  # fmt: skip
def test_odd_limits_of_images_are_named(tmp_path, content):
    folder = model_with(tmp_path, "preprocessor_config.json", json.dumps(content))
    arch = Arch.from_dir(folder)
    with pytest.raises(ValueError, match=r"pixels|preprocessor_config"):
        ImageLimits.from_dir(folder, arch.vision)
