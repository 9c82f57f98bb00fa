import asyncio
import json
import subprocess
import sys
import time

import pytest

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair, ReplayMissError
from speciarl_jax.judge.cascade import Cascade
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FaultPlan
from speciarl_jax.judge.store.cache import KeyMaker
from speciarl_jax.judge.store.sqlite_cache import SqliteCache
from speciarl_jax.judge.store.verdict_log import LoggedVerdict, VerdictLog
from speciarl_jax.types import Category, Failure, FailureKind, Verdict

PAIR = Pair("owl", "bird")


def test_keys_depend_on_everything_that_could_change_a_label():
    base = {"model": "m", "revision": "1", "prompt": "p", "temperature": 0.0}
    keys = {KeyMaker(**base).keys([PAIR])[0]}
    for field, value in [("model", "n"), ("revision", "2"), ("prompt", "q"), ("temperature", 0.5)]:
        keys.add(KeyMaker(**{**base, field: value}).keys([PAIR])[0])
    keys |= {
        KeyMaker(**base).keys([pair])[0] for pair in [Pair("owlb", "ird"), Pair("bird", "owl")]
    }
    assert len(keys) == 7


def test_put_get_and_reopen(tmp_path):
    path = str(tmp_path / "cache.sqlite")
    key = KeyMaker(model="m").keys([PAIR])[0]
    cache = SqliteCache(path)
    cache.put(key, PAIR, Category.GENERIC, "m", "scope")
    cache.put(key, PAIR, Category.WRONG, "m", "scope")  # the first label stays
    other = SqliteCache(path)  # while the first is still open, as after kill -9
    assert other.get_many([key, b"x" * 16]) == {key: Verdict(Category.GENERIC, "m", is_cached=True)}
    assert len(other) == 1


def test_memory_is_bounded(tmp_path):
    cache = SqliteCache(str(tmp_path / "c"), memory_entries=10)
    maker = KeyMaker(model="m")
    pairs = [Pair("a", str(n)) for n in range(1200)]
    for pair in pairs:
        cache.put(maker.keys([pair])[0], pair, Category.GENERIC, "m", "s")
    assert len(cache._memory) == 10
    assert len(cache.get_many([maker.keys([pair])[0] for pair in pairs])) == 1200
    assert len(cache._memory) == 10


def test_export_import_purge_stats(tmp_path):
    first = SqliteCache(str(tmp_path / "a"))
    maker = KeyMaker(model="m")
    for number, judge in enumerate(["m", "m", "n"]):
        pair = Pair("owl é", f"answer {number}")
        first.put(maker.keys([pair])[0], pair, Category(number), judge, maker.scope)
    assert first.export(tmp_path / "out.jsonl") == 3
    second = SqliteCache(str(tmp_path / "b"))
    assert second.import_(tmp_path / "out.jsonl") == 3
    assert second.import_(tmp_path / "out.jsonl") == 0
    assert list(second.rows()) == list(first.rows())
    stats = second.stats()
    assert stats["labels"] == 3
    assert stats["by_judge"] == {"m": 2, "n": 1}
    assert stats["by_category"] == {"wrong": 1, "abstain": 1, "generic": 1}
    assert second.purge(older_than_s=60.0) == 0
    assert second.purge(judge="n") == 1
    assert second.purge() == 2
    assert second.get_many([maker.keys([Pair("owl é", "answer 0")])[0]]) == {}


def test_import_names_the_bad_line_and_takes_nothing(tmp_path):
    cache = SqliteCache()
    good = SqliteCache()
    good.put(b"k" * 16, PAIR, Category.GENERIC, "m", "s")
    good.export(tmp_path / "f")
    with (tmp_path / "f").open("a") as file:
        file.write('{"key": "00"}\n')
    with pytest.raises(JudgeError, match="line 2: not an exported verdict"):
        cache.import_(tmp_path / "f")
    assert len(cache) == 0


def test_file_that_is_no_database(tmp_path):
    path = tmp_path / "c"
    path.write_text("not a database, but long enough to look like something" * 40)
    with pytest.raises(JudgeError, match="use another path"):
        SqliteCache(str(path))


WRITER = """
import sys
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.store.cache import KeyMaker
from speciarl_jax.judge.store.sqlite_cache import SqliteCache
from speciarl_jax.types import Category
cache, maker = SqliteCache(sys.argv[1]), KeyMaker(model="m")
for number in range(10**6):
    pair = Pair("a", str(number))
    cache.put(maker.keys([pair])[0], pair, Category.GENERIC, "m", "s")
    print(number, flush=True)
"""


def test_every_verdict_survives_kill_9(tmp_path):
    path = str(tmp_path / "c")
    child = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    last = -1
    while last < 200:
        last = int(child.stdout.readline())
    child.kill()
    rest = child.stdout.read().split()
    child.wait()
    child.stdout.close()
    last = int(rest[-1]) if rest and rest[-1].isdigit() else last
    cache = SqliteCache(path)
    maker = KeyMaker(model="m")
    keys = [maker.keys([Pair("a", str(number))])[0] for number in range(last)]
    assert len(cache.get_many(keys)) == len(keys)


def test_second_run_asks_nothing(number_judge, fast_config, pairs_of, tmp_path):
    async def run(*endpoints):
        config = fast_config(*endpoints, cache_path=str(tmp_path / "c"), pause_budget_s=0.2)
        async with JudgeClient(config) as judge:
            return await judge.label(pairs_of(30)), judge.stats()["judge/requests"]

    async def both():
        async with serve(number_judge) as url:
            first = await run(url)
        return first, await run("http://127.0.0.1:9/v1")

    (first, asked), (second, asked_again) = asyncio.run(both())
    assert (asked, asked_again) == (30, 0)
    assert [v.category for v in second] == [v.category for v in first]
    assert all(v.is_cached for v in second)


def test_record_and_replay_are_equal_failures_included(
    number_judge, fast_config, pairs_of, tmp_path
):
    recording = str(tmp_path / "recording")
    plan = FaultPlan.parse("500=0.5,seed=5")

    async def run(url, mode):
        config = fast_config(url, mode=mode, recording=recording, max_retries=0)
        async with JudgeClient(config) as judge:
            steps = []
            for step in range(4):
                steps.append(await judge.label(pairs_of(20), step))
                steps.append(await judge.label(pairs_of(25), step))
            return steps

    async def both():
        async with serve(number_judge, faults=plan) as url:
            recorded = await run(url, "record")
        return recorded, await run("http://127.0.0.1:9/v1", "replay")

    def plain(steps):
        return [
            [(getattr(o, "category", None), getattr(o, "kind", None)) for o in step]
            for step in steps
        ]

    recorded, replayed = asyncio.run(both())
    assert plain(recorded) == plain(replayed)
    assert sum(isinstance(o, Failure) for step in recorded for o in step) > 5
    first, second = recorded[0], recorded[1]
    failed = [n for n, o in enumerate(first) if isinstance(o, Failure)]
    assert all(isinstance(second[n], Failure) for n in failed)  # failed stays failed in its step


def test_replay_miss_names_the_pair(fast_config, tmp_path):
    config = fast_config(mode="replay", recording=str(tmp_path / "r"), endpoints=())

    async def run():
        async with JudgeClient(config) as judge:
            await judge.label([Pair("Snowy Owl", "barn owl")], step=7)

    message = "no verdict at step 7 for ground truth 'snowy owl', answer 'barn owl'"
    with pytest.raises(ReplayMissError, match=message):
        asyncio.run(run())


def test_verdict_log(number_judge, fast_config, tmp_path):
    path = str(tmp_path / "log")

    async def run():
        async with (
            serve(number_judge) as url,
            JudgeClient(fast_config(url, log_path=path, max_answer_chars=30)) as judge,
        ):
            await judge.label([Pair("Owl", "name 1")] * 3 + [Pair("owl", "owl")], step=1)
            await judge.label([Pair("owl", "name 1"), Pair("owl", "x" * 31)], step=5)

    asyncio.run(run())
    log = VerdictLog(path)
    rows = log.rows()
    assert rows[0] == LoggedVerdict("owl", "name 1", "abstain", "scripted", 4, 1, 5)
    assert LoggedVerdict("owl", "owl", "specific", "exact", 1, 1, 1) in rows
    assert log.rows(category="failed:too_long")[0].last_step == 5
    assert [row.judge for row in log.rows(text="name 1")] == ["scripted"]
    assert log.cut_back(3) == 2
    assert log.rows(text="name 1") == [
        LoggedVerdict("owl", "name 1", "abstain", "scripted", 3, 1, 1)
    ]
    log.close()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.csv", "a, ,!?\n", "row 1: the name '!\\?' is empty"),
        ("s.json", "{", "cannot be read"),
        ("s.json", '[["a", 3]]', "expected a list of lists of names"),
    ],
)
def test_bad_synonyms(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(JudgeError, match=message):
        Cascade(str(tmp_path / name))


def test_synonyms_json(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps([["Snowy Owl", "Bubo scandiacus"], ["dog", "hound"]]))
    cascade = Cascade(str(path))
    assert cascade.is_synonym(Pair("bubo scandiacus", "Snowy_owl"))
    assert not cascade.is_synonym(Pair("dog", "snowy owl"))


def test_cached_path_labels_50_000_a_second_in_one_call(fast_config, tmp_path):
    """Half from memory, half from the file; all distinct, so nothing is won by deduplication."""
    config = fast_config("http://127.0.0.1:9/v1", cache_path=str(tmp_path / "c"))
    pairs = [Pair("Black-footed Albatross", f"Some bird, number {n}!") for n in range(20_000)]
    client = JudgeClient(config)
    filler = SqliteCache(config.cache_path)
    rows = [Pair("black-footed albatross", f"some bird number {n}") for n in range(20_000)]
    filler._insert((client._keys.keys([p])[0], 2, "m", *("",) * 3, 0.0) for p in rows)

    async def run():
        async with client as judge:
            await judge.label(pairs[:10_000])
            rates = []
            for _ in range(3):
                judge._cache._memory = dict(list(judge._cache._memory.items())[:10_000])
                started = time.process_time()
                outcomes = await judge.label(pairs)
                rates.append(len(pairs) / (time.process_time() - started))
            return outcomes, rates

    outcomes, rates = asyncio.run(run())
    assert all(v.category is Category.GENERIC for v in outcomes)
    assert max(rates) > 50_000  # per second of processor time: the machine may be shared


def test_failed_labels_are_not_cached(fast_config, number_judge, pairs_of, tmp_path):
    async def run():
        async with serve(number_judge, faults=FaultPlan.parse("500=1")) as url:
            config = fast_config(url, max_retries=0, cache_path=str(tmp_path / "c"))
            async with JudgeClient(config) as judge:
                return await judge.label(pairs_of(1)), len(judge._cache)

    (outcome,), size = asyncio.run(run())
    assert outcome.kind is FailureKind.SERVER
    assert size == 0
