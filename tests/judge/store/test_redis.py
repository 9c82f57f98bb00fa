"""The Redis cache against a real server; skipped where there is no redis-server."""

import asyncio
import shutil
import socket
import subprocess
import sys
import time

import pytest

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.store.cache import KeyMaker, open_cache
from speciarl_jax.judge.store.sqlite_cache import SqliteCache
from speciarl_jax.types import Category, Verdict

MAKER = KeyMaker(model="m")
PASSWORD = "for this test only"


@pytest.fixture(scope="module")
def socket_url(tmp_path_factory):
    """A server with a password and one foreign key, on a port of its own choice."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--databases", "16"]
    options += ["--dir", str(tmp_path_factory.mktemp("redis")), "--requirepass", PASSWORD]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def url(socket_url, monkeypatch):
    """An empty database that holds somebody else's key."""
    import redis

    monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
    client = redis.Redis.from_url(f"{socket_url}/3", password=PASSWORD)
    until = time.monotonic() + 20
    while True:
        try:
            client.flushdb()
            break
        except redis.ConnectionError:
            assert time.monotonic() < until
            time.sleep(0.02)
    client.set("theirs", "kept")
    yield f"{socket_url}/3"
    assert client.get("theirs") == b"kept"
    client.close()


def fill(cache, count, judge="m"):
    pairs = [Pair("owl é", f"answer {number}") for number in range(count)]
    for number, pair in enumerate(pairs):
        cache.put(MAKER.keys([pair])[0], pair, Category(number % 6), judge, MAKER.scope)
    return MAKER.keys(pairs)


def test_first_label_stays_and_others_see_it(url):
    first, second = open_cache(url), open_cache(url)
    (key,) = fill(first, 1)
    second.put(key, Pair("owl é", "answer 0"), Category.GENERIC, "n", "s")
    third = open_cache(url)
    assert third.get_many([key, b"x" * 16]) == {key: Verdict(Category.WRONG, "m", is_cached=True)}
    assert len(third) == 1
    for cache in (first, second, third):
        cache.close()


def test_same_rows_stats_and_purge_as_a_file(url, tmp_path):
    shared, file = open_cache(url), SqliteCache(str(tmp_path / "c"))
    for cache in (shared, file):
        fill(cache, 9)
    shared.export(tmp_path / "out.jsonl")
    other = SqliteCache(str(tmp_path / "d"))
    assert other.import_(tmp_path / "out.jsonl") == 9
    assert list(other.rows()) == list(shared.rows())
    assert [r["answer"] for r in shared.rows()] == [r["answer"] for r in file.rows()]
    here, there = shared.stats(), file.stats()
    assert {**here, "bytes": 0} == {**there, "bytes": 0}
    assert here["bytes"] > 9 * 33
    assert shared.purge(older_than_s=60.0) == 0
    assert shared.purge(judge="n") == 0
    assert shared.purge(judge="m") == 9
    assert len(shared) == 0
    assert shared.get_many(fill(file, 9)) == {}  # memory went too
    assert shared.import_(tmp_path / "out.jsonl") == 9
    assert shared.import_(tmp_path / "out.jsonl") == 0
    shared.close()


def test_batches_longer_than_a_round_trip(url, monkeypatch):
    monkeypatch.setattr("speciarl_jax.judge.store.redis_cache._CHUNK", 100)
    cache = open_cache(url)
    pairs = [Pair("owl", str(number)) for number in range(250)]
    keys = MAKER.keys(pairs)
    cache._insert([(k, 2, "m", *p, "s", 0.0) for k, p in zip(keys, pairs, strict=True)])
    cache.close()
    again = open_cache(url)
    assert len(again.get_many([*keys, b"y" * 16])) == 250
    again.close()


def test_second_host_asks_nothing(url, number_judge, fast_config, pairs_of):
    async def run():
        async with serve(number_judge) as endpoint:
            found = []
            for _ in range(2):
                async with JudgeClient(fast_config(endpoint, cache_path=url)) as judge:
                    outcomes = await judge.label(pairs_of(30))
                    found.append(([o.category for o in outcomes], judge.stats()["judge/requests"]))
            return found

    (first, asked), (second, asked_again) = asyncio.run(run())
    assert first == second
    assert (asked, asked_again) == (30, 0)


def test_wrong_password_and_no_server_are_one_line(url, monkeypatch):
    monkeypatch.setenv("REDIS_PASSWORD", "wrong")
    with pytest.raises(JudgeError, match=r"redis://127.*/3: .*password") as info:
        open_cache(url)
    assert "\n" not in str(info.value)
    assert PASSWORD not in str(info.value)
    with pytest.raises(JudgeError, match="see that the server runs"):
        open_cache("redis://127.0.0.1:9/0")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("redis://user:secret@host/0", "put the password into REDIS_PASSWORD"),
        ("redis://host/0?socket_timeout=1", "password or options"),
        ("redis://", "expected a file, or redis://HOST:PORT/DB"),
        ("redis://host:port/0", "expected a file, or redis"),
        ("redis://host/verdicts", "numbers for PORT and DB"),
        ("memcached://host/0", "expected a file, or redis"),
    ],
)
def test_bad_urls_are_refused_without_showing_them(place, message):
    with pytest.raises(ValueError, match=message) as info:
        JudgeConfig(cache_path=place).validate()
    assert "secret" not in str(info.value)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ValueError, match=r"speciarl-jax\[redis\]"):
        open_cache("redis://127.0.0.1:9/0")


def test_a_restart_of_the_server_is_waited_for_and_its_end_is_told(monkeypatch, tmp_path):
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    monkeypatch.delenv("REDIS_PASSWORD", raising=False)
    port = _free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    command += ["--appendonly", "yes", "--appendfsync", "always"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cache = _when_up(f"redis://127.0.0.1:{port}/0")
    (key,) = fill(cache, 1)
    server.kill()
    server.wait()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cache._memory.clear()
    assert cache.get_many([key])[key].category is Category.WRONG  # waited, and nothing was lost
    server.kill()
    server.wait()
    cache.patience_s = 0.3
    with pytest.raises(JudgeError, match="see that the server runs"):
        fill(cache, 2)
    cache.close()


def _when_up(url):
    until = time.monotonic() + 20
    while True:
        try:
            return open_cache(url)
        except JudgeError:
            assert time.monotonic() < until
            time.sleep(0.02)
