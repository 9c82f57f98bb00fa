"""Training through a judge's outage, without a judge for good, and from a recording."""

import threading
import time

import pytest

from speciarl_jax import metrics, train
from speciarl_jax.judge.base import JudgeDownError, ReplayMissError
from speciarl_jax.judge.config import FIELD_GUIDE_TAXONOMY
from speciarl_jax.judge.server import LocalJudgeServer
from tests.test_train import small_config

QUIET = {"eval__score_base": False, "eval__score_trained": False}


def rows(workdir):
    return [metrics.deterministic(r) for r in metrics.read_rows(workdir / "metrics.jsonl")]


def judge_server(port=0):
    return LocalJudgeServer(FIELD_GUIDE_TAXONOMY, port=port)


def port_of(server):
    return int(server.url.split(":")[2].split("/")[0])


def endpoint_config(port, **changes):
    return small_config(
        train__num_steps=3,
        judge__kind="endpoint",
        judge__model="judge",
        judge__endpoints=(f"http://127.0.0.1:{port}/v1",),
        judge__has_cascade=False,
        judge__timeout_s=5.0,
        judge__backoff_s=0.05,
        judge__backoff_max_s=0.2,
        **QUIET,
        **changes,
    )


def train_through_outage(folder, outage_s):
    """One run with a judge, one whose judge is killed after the first step and comes back.

    Returns the rows of both, times and judge counters included.
    """
    with judge_server() as server:
        train.main(endpoint_config(port_of(server)), folder / "calm")
    first = judge_server()
    first.start()
    port, workdir, again = port_of(first), folder / "outage", []

    def kill_and_restart():
        while not (workdir / "metrics.jsonl").is_file() or not rows(workdir):
            time.sleep(0.01)
        first.stop()
        time.sleep(outage_s)
        again.append(judge_server(port))
        again[0].start()

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    train.main(endpoint_config(port), workdir)
    thread.join()
    again[0].stop()
    return [metrics.read_rows(folder / name / "metrics.jsonl") for name in ("calm", "outage")]


@pytest.mark.slow
def test_outage_pauses_and_leaves_no_trace_in_the_metrics(tmp_path, caplog):
    calm, outage = train_through_outage(tmp_path, 10.0)
    assert [metrics.deterministic(r) for r in outage] == [metrics.deterministic(r) for r in calm]
    assert outage[-1]["judge/pause_s"] > 4.0 > calm[-1]["judge/pause_s"]
    assert any("judge paused" in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_judge_gone_for_good_stops_resumable(tmp_path):
    workdir = tmp_path / "run"
    server = judge_server()
    server.__enter__()

    def kill():
        while not (workdir / "metrics.jsonl").is_file() or not rows(workdir):
            time.sleep(0.01)
        server.__exit__(None, None, None)

    thread = threading.Thread(target=kill)
    thread.start()
    config = endpoint_config(port_of(server), judge__pause_budget_s=3.0)
    config.train.num_steps = 30
    with pytest.raises(JudgeDownError):
        train.main(config, workdir)
    thread.join()
    done = len(rows(workdir))
    assert 1 <= done < 30
    assert all(row["category/judge_failure_frac"] == 0 for row in rows(workdir))
    with judge_server() as again:
        config = endpoint_config(port_of(again))
        config.train.num_steps = done + 1
        train.main(config, workdir, resume=True)
    assert len(rows(workdir)) == done + 1


@pytest.mark.slow
def test_replay_is_offline_and_bit_equal(tmp_path):
    recording = str(tmp_path / "recording.sqlite")
    live = small_config(judge__mode="record", judge__recording=recording, **QUIET)
    train.main(live, tmp_path / "live")
    replay = small_config(judge__mode="replay", judge__recording=recording, **QUIET)
    train.main(replay, tmp_path / "replay")
    assert rows(tmp_path / "live") == rows(tmp_path / "replay")


@pytest.mark.slow
def test_a_pair_missing_from_the_recording_is_named(tmp_path):
    recording = str(tmp_path / "recording.sqlite")
    live = small_config(judge__mode="record", judge__recording=recording, **QUIET)
    train.main(live, tmp_path / "live")
    other = small_config(judge__mode="replay", judge__recording=recording, **QUIET)
    other.seed = 3
    with pytest.raises(ReplayMissError, match=r"finch|heron|ibis|wren"):
        train.main(other, tmp_path / "other")
