import argparse
import json

import pytest

from speciarl_jax.cli import judge
from speciarl_jax.config.judge import JudgeConfig, apply_overrides
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.store.sqlite_cache import SqliteCache


def run(*argv):
    parser = argparse.ArgumentParser()
    judge.register(parser.add_subparsers(dest="verb"))
    args = parser.parse_args(["judge", *map(str, argv)])
    return args.handler(args)


@pytest.fixture
def pairs_path(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("scarlet finch", "finch", "less_specific"), ("scarlet finch", "bird", "specific")]
    path.write_text(
        "".join(
            json.dumps({"ground_truth": t, "answer": a, "category": c, "id": 7}) + "\n"
            for t, a, c in rows
        )
    )
    return path


def test_label_then_cache_commands(tree_path, pairs_path, tmp_path, capsys):
    out, cache = tmp_path / "out.jsonl", tmp_path / "cache.sqlite"
    args = ["--taxonomy", tree_path, "--set", f"cache_path={cache}"]
    assert run("label", pairs_path, "--out", out, *args) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["category"] for row in rows] == ["less_specific", "generic"]
    assert rows[0]["id"] == 7
    assert rows[0]["failure"] is None
    capsys.readouterr()
    assert run("cache", "stats", cache) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == 2
    assert run("cache", "export", cache, "--file", tmp_path / "e.jsonl") == 0
    assert run("cache", "import", tmp_path / "new", "--file", tmp_path / "e.jsonl") == 0
    assert run("cache", "purge", cache) == 0
    assert len(SqliteCache(str(cache))) == 0
    assert len(SqliteCache(str(tmp_path / "new"))) == 2


def test_label_with_a_failure_exits_1(tree_path, tmp_path, capsys):
    pairs = tmp_path / "p.jsonl"
    pairs.write_text('{"ground_truth": "dragon", "answer": "bird"}\n')
    assert run("label", pairs, "--out", tmp_path / "o", "--taxonomy", tree_path) == 1
    row = json.loads((tmp_path / "o").read_text())
    assert row["category"] is None
    assert row["failure"].startswith("server: ")
    assert "0 of 1 pairs labelled" in capsys.readouterr().out


def test_eval_prints_one_json_object(tree_path, pairs_path, capsys):
    assert run("eval", pairs_path, "--json", "--taxonomy", tree_path) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agreement"] == 0.5
    assert report["confusion"]["specific"]["generic"] == 1
    assert run("eval", pairs_path, "--taxonomy", tree_path) == 0
    assert "agreement 0.500" in capsys.readouterr().out


def test_eval_with_missing_labels_exits_1(tree_path, tmp_path, capsys):
    pairs = tmp_path / "p.jsonl"
    known = '{"ground_truth": "scarlet finch", "answer": "bird", "category": "generic"}\n'
    pairs.write_text(known + known.replace("scarlet finch", "dragon"))
    assert run("eval", pairs, "--taxonomy", tree_path) == 1
    assert "1 of 2 pairs got no label" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such folder"):
        run("label", pairs, "--out", tmp_path / "x" / "o", "--taxonomy", tree_path)


def test_check_against_a_served_judge(tree_path, capsys):
    with LocalJudgeServer(tree_path) as server:
        assert run("check", "--endpoint", server.url, "--model", "taxonomy-remote") == 0
    assert "judge answers" in capsys.readouterr().out
    args = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--deadline_s", "0.2"]
    with pytest.raises(JudgeError, match="refused"):
        run("check", *args)


def test_log_command(tree_path, pairs_path, tmp_path, capsys):
    log = tmp_path / "log.sqlite"
    args = ["--taxonomy", tree_path, "--set", f"log_path={log}"]
    run("label", pairs_path, "--out", tmp_path / "o", *args)
    capsys.readouterr()
    assert run("log", log, "--category", "generic") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["answer"], row["count"]) == ("bird", 1)


@pytest.mark.parametrize(
    ("argv", "kind", "message"),
    [
        (["cache", "stats", "/no/such"], JudgeError, "no such file"),
        (["cache", "export", "/no/such"], ValueError, "needs --file"),
        (["log", "/no/such"], JudgeError, "no such file"),
        (["check", "--endpoint", "http://h/v1"], ValueError, "needs --model"),
        (["check", "--set", "colour=red"], ValueError, "expected FIELD=VALUE"),
        (["check", "--set", "concurrency=many"], ValueError, "'many': expected int"),
        (["label", "/no/such", "--out", "x"], ValueError, "cannot be read"),
        (["log", __file__, "--category", "genric"], ValueError, "expected one of wrong, abstain"),
        (["cache", "stats", "redis://"], ValueError, "expected a file, or redis"),
    ],
)
def test_errors_are_one_line(argv, kind, message):
    with pytest.raises(kind, match=message) as info:
        run(*argv)
    assert "\n" not in str(info.value)


def test_bad_pairs_name_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"ground_truth": "a", "answer": "b"}\n\n{"ground_truth": 3}\n')
    with pytest.raises(ValueError, match="line 3: expected an object"):
        run("label", path, "--out", tmp_path / "o")


def test_overrides_follow_the_type_of_the_field():
    config = apply_overrides(
        JudgeConfig(),
        ["concurrency=7", "has_cascade=false", "timeout_s=1.5", "endpoints=http://a;http://b"],
    )
    assert (config.concurrency, config.has_cascade, config.timeout_s) == (7, False, 1.5)
    assert config.endpoints == ("http://a", "http://b")
