"""The heartbeat beats on, whatever the clock on the wall and the disk do."""

import json

from speciarl_jax.monitor import watch


def test_a_clock_that_is_set_back_does_not_stop_it(tmp_path, monkeypatch):
    beats = watch.Heartbeat(tmp_path, 0)
    beats.beat(1)
    monkeypatch.setattr(watch, "_BEAT_EVERY_S", 0.0)
    monkeypatch.setattr(watch.time, "time", lambda: 1000.0)
    beats.beat(2)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 2


def test_it_beats_at_most_every_few_seconds(tmp_path):
    beats = watch.Heartbeat(tmp_path, 0)
    for step in (1, 2, 3):
        beats.beat(step)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 1


def test_a_disk_that_refuses_is_warned_of_and_does_not_end_the_step(tmp_path, caplog):
    beats = watch.Heartbeat(tmp_path / "gone", 0)
    beats.beat(1)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "no heartbeat" in told
    assert "gone" in told
