"""Training through a judge's outage, without a judge for good, and from a recording."""

import threading
import time

import pytest

from speciarl_jax import train
from speciarl_jax.judge.base import JudgeDownError, ReplayMissError
from speciarl_jax.monitor import writer
from tests.support.outage import endpoint_config, judge_server, port_of, train_through_outage
from tests.support.training import QUIET, rows, small_config


@pytest.mark.slow
def test_outage_pauses_and_leaves_no_trace_in_the_metrics(tmp_path, caplog):
    calm, outage = train_through_outage(tmp_path, 10.0)
    assert [writer.deterministic(r) for r in outage] == [writer.deterministic(r) for r in calm]
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
