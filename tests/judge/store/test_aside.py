"""A lock, a stopped Redis, a Redis that is gone: the event loop goes on, and the end is told."""

import asyncio
import shutil
import signal
import sqlite3
import subprocess
import time

import pytest

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.store.cache import open_cache
from tests.judge.store.test_redis import _free_port, _when_up


@pytest.mark.parametrize("place", ["cache_path", "log_path", "recording"])
def test_a_locked_database_stops_no_request(
    place, number_judge, fast_config, pairs_of, expect, tmp_path
):
    """Only this event loop lets the lock go: if it waited for the lock, both would wait."""
    path = str(tmp_path / "locked.sqlite")
    mode = "record" if place == "recording" else "live"

    async def run():
        async with serve(number_judge) as url:
            config = fast_config(url, mode=mode, timeout_s=0.5, **{place: path})
            async with JudgeClient(config) as judge:
                other = sqlite3.connect(path, isolation_level=None)
                other.execute("BEGIN IMMEDIATE")
                task = asyncio.create_task(judge.label(pairs_of(100)))
                await asyncio.sleep(1.0)  # twice the time-out of a request
                assert not task.done()
                answered = judge.stats()["judge/requests"]
                other.execute("COMMIT")
                other.close()
                return answered, await asyncio.wait_for(task, 20), judge.stats()

    answered, outcomes, stats = asyncio.run(run())
    assert answered == 100
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(100)]
    assert stats["judge/error_timeout"] == 0


@pytest.fixture
def redis_server(monkeypatch, tmp_path):
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    monkeypatch.delenv("REDIS_PASSWORD", raising=False)
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    _when_up(url).close()
    yield server, url
    server.kill()
    server.wait()


def test_a_stopped_redis_stops_no_request(
    redis_server, number_judge, fast_config, pairs_of, expect
):
    server, place = redis_server

    async def run():
        async with serve(number_judge) as url:
            config = fast_config(url, cache_path=place, timeout_s=0.4)
            async with JudgeClient(config) as judge:
                first = await judge.label(pairs_of(10))
                judge._cache._memory.clear()
                asking = asyncio.create_task(judge.label(pairs_of(100)))
                while judge.stats()["judge/requests"] < 20:
                    await asyncio.sleep(0.001)
                server.send_signal(signal.SIGSTOP)
                await asyncio.sleep(1.0)
                answered = judge.stats()["judge/requests"]
                server.send_signal(signal.SIGCONT)
                return first, answered, await asyncio.wait_for(asking, 20), judge.stats()

    _, answered, outcomes, stats = asyncio.run(run())
    assert answered == 100
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(100)]
    assert stats["judge/error_timeout"] == 0


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_redis_that_is_gone_for_good_ends_it_within_ten_seconds(
    number, redis_server, number_judge, fast_config, pairs_of
):
    server, place = redis_server

    async def run():
        async with (
            serve(number_judge) as url,
            JudgeClient(fast_config(url, cache_path=place)) as judge,
        ):
            await judge.label(pairs_of(10))
            server.send_signal(number)
            started = time.monotonic()
            with pytest.raises(JudgeError, match="see that the server runs") as info:
                await judge.label(pairs_of(200))
            took = time.monotonic() - started
            with pytest.raises(JudgeError):
                await judge.label(pairs_of(200))
        return took, time.monotonic() - started, str(info.value)

    took, took_in_all, message = asyncio.run(run())
    assert took < 10
    assert took_in_all < 14  # the second call and the end had no patience left
    assert "\n" not in message


@pytest.mark.slow
def test_a_redis_that_answers_again_gets_patience_again(redis_server):
    server, place = redis_server
    cache = open_cache(place)
    cache.patience_s = 0.2
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(JudgeError):
        cache.fetch([b"x" * 16])
    server.send_signal(signal.SIGCONT)
    assert cache.fetch([b"x" * 16]) == []
    assert cache._out_since is None
    cache.close()
