import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.types import Category, Verdict

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def is_gone(pid, deadline_s=20.0):
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_the_server_speaks_openai(tree_path):
    with LocalJudgeServer(tree_path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        root = server.url.removesuffix("/v1")
        assert call(f"{root}/health") == (200, {"status": "ok"})
        assert call(f"{server.url}/models")[1]["data"][0]["id"] == "taxonomy"
        chat = f"{server.url}/chat/completions"
        payload = json.dumps({"ground_truth": "scarlet finch", "answer": "finch"})
        messages = [{"role": "user", "content": f"Grade.\n{payload}"}]
        status, body = call(chat, {"model": "taxonomy", "messages": messages})
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "less_specific"
        assert body["usage"]["total_tokens"] > 0
        payload = json.dumps({"ground_truth": "dragon", "answer": "finch"})
        messages = [{"role": "user", "content": payload}]
        status, body = call(chat, {"model": "taxonomy", "messages": messages})
        assert status == 422
        assert "'dragon' is not in taxonomy" in body["error"]["message"]
        assert call(chat, [1])[0] == 400
        pid = server.pid
    assert is_gone(pid)


def judge_threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "judge"]


def test_judge_thread_with_the_embedded_judge(tree_path):
    with JudgeThread(JudgeConfig(taxonomy=str(tree_path))) as judge:
        judge.check_health(20.0)
        futures = [
            judge.submit([Pair("scarlet finch", answer)], step=1)
            for answer in ("finch", "golden finch", "I don't know", "songbird")
        ]
        found = [future.result(timeout=60)[0].category for future in futures]
        assert found == [Category.LESS_SPECIFIC, Category.WRONG, Category.ABSTAIN, Category.GENERIC]
        assert judge.label([Pair("scarlet finch", "a finch")]) == [
            Verdict(Category.LESS_SPECIFIC, "taxonomy")
        ]
        stats = judge.stats()
        assert stats["judge/failed_frac"] == 0
        assert stats["judge/endpoints_up"] == 1
        (dragon,) = judge.label([Pair("dragon", "finch")])
        assert "'dragon' is not in taxonomy" in dragon.message
    judge.close()
    with pytest.raises(JudgeError, match="judge is closed"):
        judge.submit([])
    assert judge_threads() == []


def test_default_configuration_judges_by_the_field_guide():
    with JudgeThread(JudgeConfig()) as judge:
        judge.check_health(20.0)
        (verdict,) = judge.label([Pair("scarlet finch", "crimson finch")])
        assert verdict.category is Category.SPECIFIC


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "expected a tree of names")]
)
def test_server_that_cannot_start_says_why(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(JudgeError, match=f"local judge did not start: .*{message}"):
        JudgeThread(JudgeConfig(taxonomy=str(path)))
    assert judge_threads() == []


@pytest.mark.parametrize(("text", "is_warned"), [("a\nx\ny\n", True), ("a,b,c\nx,y,z\n", False)])
def test_a_ladder_without_rungs_is_told_at_the_start(text, is_warned, tmp_path, caplog):
    path = tmp_path / "tree.csv"
    path.write_text(text)
    with LocalJudgeServer(path) as server:
        assert "classes, depth" in server.told
    assert ("rung" in caplog.text) == is_warned  # at INFO otherwise


def test_port_that_is_taken(tree_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(JudgeError, match=r"did not start: .*in use"):
            LocalJudgeServer(tree_path, port=port).start()


def test_closed_port_is_one_clear_line():
    config = JudgeConfig(kind="endpoint", endpoints=("http://127.0.0.1:9/v1",), model="m")
    with JudgeThread(config) as judge:
        with pytest.raises(
            JudgeError, match=r"127.0.0.1:9.*refused.*check judge.endpoints"
        ) as info:
            judge.check_health(0.3)
        assert "\n" not in str(info.value)


PARENT = """
import sys, time
from speciarl_jax.judge.offline.server import LocalJudgeServer
server = LocalJudgeServer(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_child_does_not_outlive_its_parent(tree_path, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tree_path)], stdout=subprocess.PIPE
    )
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    assert is_gone(pid)


def test_killed_and_restarted_server_pauses_the_client(tree_path, fast_config):
    """The judge's process is killed with -9 in mid-call and comes back on its port."""
    server = LocalJudgeServer(tree_path, faults="latency=0.01")
    url = server.start()
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    config = fast_config(url, concurrency=4, timeout_s=2.0)
    pairs = [Pair("scarlet finch", f"word {number}") for number in range(200)]
    with JudgeThread(config) as judge:
        future = judge.submit(pairs)
        time.sleep(0.15)
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(0.7)
        assert not future.done()
        server.stop()
        with LocalJudgeServer(tree_path, port=port):
            outcomes = future.result(timeout=60)
        assert {outcome.category for outcome in outcomes} == {Category.WRONG}
        assert judge.stats()["judge/failed"] == 0
        assert judge.stats()["judge/pause_s"] > 0.3


@pytest.mark.parametrize("voters", [(), ("model=a", "model=b")])
def test_close_while_pairs_wait(tree_path, fast_config, voters):
    with LocalJudgeServer(tree_path, faults="hang=1") as server:
        judge = JudgeThread(fast_config(server.url, voters=voters))
        future = judge.submit([Pair("scarlet finch", "finch")])
        time.sleep(0.2)
        judge.close()
        with pytest.raises(JudgeError, match="closed while pairs were waiting"):
            future.result(timeout=5)


def test_close_waits_for_no_check_under_way(fast_config):
    """As when Ctrl-C ends the caller's wait: the check itself would go on for an hour."""
    judge = JudgeThread(fast_config("http://127.0.0.1:9/v1", model="m", backoff_max_s=3600.0))
    ended = []

    def check():
        with pytest.raises((JudgeError, concurrent.futures.CancelledError)):
            judge.check_health(3600.0)
        ended.append(True)

    threads = [threading.Thread(target=f, daemon=True) for f in (check, judge.close)]
    threads[0].start()
    time.sleep(0.3)
    threads[1].start()
    for thread in reversed(threads):
        thread.join(timeout=30)
    assert ended == [True]
    assert judge_threads() == []


def test_submit_does_not_wait_for_the_loop(tree_path):
    """The caller goes on decoding while the loop is at work."""
    with JudgeThread(JudgeConfig(taxonomy=str(tree_path))) as judge:
        held, release, waited = threading.Event(), threading.Event(), []
        judge._loop.call_soon_threadsafe(lambda: (held.set(), waited.append(release.wait(30))))
        held.wait()
        future = judge.submit([Pair("scarlet finch", "finch")])
        release.set()
        assert future.result(timeout=60)[0].category is Category.LESS_SPECIFIC
        assert waited == [True]  # submit had returned before the loop was free


def test_importing_the_room_has_no_effect_and_needs_no_jax():
    code = (
        "import sys, threading, pkgutil, importlib, speciarl_jax.judge as room\n"
        "for item in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(item.name)\n"
        "assert 'jax' not in sys.modules and threading.active_count() == 1\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loop_is_free_while_the_server_starts(tree_path):
    """Starting the embedded server must not stop other tasks of the loop."""
    from speciarl_jax.judge.client import JudgeClient

    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        task = asyncio.create_task(tick())
        async with JudgeClient(JudgeConfig(taxonomy=str(tree_path))):
            seen = ticks
        task.cancel()
        return seen

    assert asyncio.run(run()) > 3
