import argparse
import contextlib
import json
import urllib.request
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from speciarl_jax.cli import judge
from speciarl_jax.config.judge import JudgeConfig, apply_overrides
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.store.sqlite_cache import SqliteCache
from speciarl_jax.judge.store.verdict_log import VerdictLog
from speciarl_jax.types import Category, Verdict
from tests.support.hostile_server import HostileServer, completion, http


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


def revoked_after(count):
    """A judge whose key is revoked after `count` labels."""
    asked = []

    def answer(payload, number):
        if payload["answer"] == "canary pair" or len(asked) >= count:
            return http({"error": {"message": "key revoked"}}, "401 Unauthorized")
        asked.append(payload["answer"])
        return http(completion("generic"))

    return HostileServer(answer), asked


@contextlib.contextmanager
def in_thread(server):
    """Serves in an event loop of its own, for code that runs its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server.open()) as url:
        yield url


def label_args(pairs, out, url):
    args = ["label", pairs, "--out", out, "--endpoint", url, "--model", "m"]
    for setting in ("structured=choice", "concurrency=1", "pause_budget_s=0.3", "backoff_s=0.01"):
        args += ["--set", setting]
    return args


def test_labels_that_were_paid_for_outlive_a_revoked_key(tmp_path, capsys):
    pairs, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    pairs.write_text(
        "".join(f'{{"ground_truth": "owl", "answer": "bird {n}"}}\n' for n in range(9))
    )
    server, first = revoked_after(5)
    with in_thread(server) as url, pytest.raises(JudgeError) as info:
        run(*label_args(pairs, out, url))
    assert f"(5 labels in {out}.cache.sqlite: the same command asks for the rest only)" in str(
        info.value
    )
    assert [path.name for path in tmp_path.iterdir() if path != pairs] == ["out.jsonl.cache.sqlite"]
    server, second = revoked_after(100)
    with in_thread(server) as url:
        assert run(*label_args(pairs, out, url)) == 0
    assert sorted(first + second) == [f"bird {n}" for n in range(9)]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"bird {n}" for n in range(9)]
    assert {row["category"] for row in rows} == {"generic"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.jsonl"]


def test_a_call_that_labelled_nothing_leaves_nothing(pairs_path, tmp_path):
    server, _ = revoked_after(0)
    with in_thread(server) as url, pytest.raises(JudgeError, match="nothing was labelled"):
        run(*label_args(pairs_path, tmp_path / "out", url))
    assert list(tmp_path.iterdir()) == [pairs_path]


@pytest.mark.parametrize("verb", ["label", "eval"])
def test_an_output_that_cannot_be_written_is_told_before_anybody_is_asked(
    verb, pairs_path, tmp_path
):
    server, _ = revoked_after(100)
    (tmp_path / "folder").mkdir()
    outs = [tmp_path / "folder", tmp_path / "no" / "out", Path("/proc/out")]
    with in_thread(server) as url:
        for out in outs:
            with pytest.raises(
                (ValueError, OSError), match=r"no such|No such|a folder|a directory"
            ):
                run(*[verb, *label_args(pairs_path, out, url)[1:]])
    assert server.num_requests == 0


def test_a_folder_for_an_output_is_bad_usage(pairs_path, tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        run(*label_args(pairs_path, tmp_path, "http://127.0.0.1:9/v1"))


def test_a_failed_pair_is_asked_again_by_the_next_call(tmp_path):
    pairs, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    rows = ["bird", "poison"]
    pairs.write_text("".join(f'{{"ground_truth": "owl", "answer": "{a}"}}\n' for a in rows))
    is_blocked = [True]

    def answer(payload, number):
        asked.append(payload["answer"])
        if payload["answer"] == "poison" and is_blocked[0]:
            return http("{}", "400 No")
        return http(completion("generic"))

    asked = []
    with in_thread(HostileServer(answer)) as url:
        assert run(*label_args(pairs, out, url)) == 1
        is_blocked.clear(), is_blocked.append(False)
        assert run(*label_args(pairs, out, url)) == 0
    assert asked == ["bird", "poison", "poison"]
    assert not Path(f"{out}.cache.sqlite").exists()


def test_a_model_is_accepted_under_any_name_that_the_endpoint_gives(tree_path, capsys):
    with LocalJudgeServer(tree_path) as server:
        with urllib.request.urlopen(f"{server.url}/models") as response:
            (model,) = json.load(response)["data"]
        assert run("check", "--endpoint", server.url, "--model", model["id"]) == 0


def models(names):
    return http({"object": "list", "data": [{"id": name} for name in names]})


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        (models(["qwen", "other"]), "(now 'm'; served: qwen, other)"),
        (models(["m"]), "judge.model and"),
        (models([]), "judge.model and"),
        (http("[" * 5000), "judge.model and"),
        (http({"data": [3, {"id": 4}]}), "judge.model and"),
        (http(b" " * (4 * 2**20 + 1)), "judge.model and"),
        (http(b" " * (4 * 2**20 - 60) + b'{"data": [{"id": "qwen"}]}'), "served: qwen"),
        (http("", "307 Moved", ["Location: http://127.0.0.1:9/"]), "judge.model and"),
    ],
)
def test_check_says_which_models_are_served(listed, told):
    def answer(payload, number):
        return listed if payload is None else http({"error": "no such model"}, "404 Not Found")

    with in_thread(HostileServer(answer)) as url, pytest.raises(JudgeError) as info:
        run("check", "--endpoint", url, "--model", "m", "--deadline_s", "0.2")
    assert told in str(info.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "birds and flowers", "not valid JSON"),
        ("package.json", '{"name": "x", "version": "1"}', "expected a tree of names, got 'x'"),
        ("a.json", '{"name": "a", "children": "bc"}', "expected a list of children"),
        ("a.json", '{"name": "a", "children": 5}', "expected a list of children"),
        ("a.json", '{"name": "a", "synonyms": "b", "children": []}', "expected a list of synonyms"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("pairs.csv", "ground_truth,answer,category\na,b,wrong\n", "got a column 'answer'"),
        ("log.csv", "epoch,loss\n1,0.5\n2,0.25\n", "got numbers such as '1'"),
        ("image.png", "\x89PNG\r\n", "not valid JSON"),
    ],
)
def test_check_refuses_what_is_no_taxonomy(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(JudgeError, match=message) as info:
        run("check", "--taxonomy", tmp_path / name)
    assert "\n" not in str(info.value)


def test_check_says_what_a_taxonomy_can_tell(tmp_path, tree_path, capsys):
    flat = tmp_path / "flat.csv"
    flat.write_text("class\n" + "".join(f"class {n} a\n" for n in range(27)))
    assert run("check", "--taxonomy", flat) == 0
    told = capsys.readouterr().out
    assert f"{flat}: 27 classes, depth 1: no generic or less specific rung" in told
    assert run("check", "--taxonomy", tree_path) == 0
    assert "4 classes, depth 6: generic and less specific rungs" in capsys.readouterr().out


def test_eval_without_an_endpoint_says_what_the_offline_judge_knows(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"names of the field guide only.*--endpoint"):
        run("eval")
    pairs = tmp_path / "p.jsonl"
    pair = {"ground_truth": "scarlet finch", "answer": "finch", "category": "less_specific"}
    pairs.write_text(json.dumps(pair))
    assert run("eval", pairs, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["agreement"] == 1.0
    assert "names of the field guide only" in said.err


def test_log_takes_a_run_directory(tmp_path, capsys):
    for process, answers in (("", ["bird", "bird", "owl"]), (".1", ["bird"] * 3)):
        with contextlib.closing(VerdictLog(str(tmp_path / f"verdicts{process}.sqlite"))) as log:
            verdicts = [Verdict(Category.GENERIC, "m")] * len(answers)
            log.add(1, [Pair("x", answer) for answer in answers], verdicts)
    assert run("log", tmp_path) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["answer"], row["count"]) for row in rows] == [
        ("bird", 3), ("bird", 2), ("owl", 1)
    ]  # fmt: skip
    assert run("log", tmp_path, "--limit", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(JudgeError, match="holds no verdicts"):
        run("log", tmp_path / "empty")


def test_overrides_follow_the_type_of_the_field():
    config = apply_overrides(
        JudgeConfig(),
        ["concurrency=7", "has_cascade=false", "timeout_s=1.5", "endpoints=http://a;http://b"],
    )
    assert (config.concurrency, config.has_cascade, config.timeout_s) == (7, False, 1.5)
    assert config.endpoints == ("http://a", "http://b")
