"""What a run shows and where its numbers go: terminal, log, TensorBoard, W&B."""

import io
import json
import pathlib
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from speciarl_jax.config.schema import Config
from speciarl_jax.monitor import live
from speciarl_jax.monitor.tables import step_line
from speciarl_jax.monitor.writer import MetricsWriter, answers_markdown, open_wandb
from speciarl_jax.types import Category, Rollout, Verdict

HOSTILE = "<script>|alert(1)|</script> [bold] ![x](http://y)"


def rollout(prediction, category, sample=0):
    return Rollout(
        prompt_id="birds/test/1",
        dataset="birds",
        ground_truth="scarlet finch",
        sample_index=sample,
        completion_tokens=np.zeros(0, np.int32),
        rollout_logprobs=np.zeros(0, np.float32),
        completion=f"<answer>{prediction}</answer>",
        prediction=prediction,
        outcome=None if category is None else Verdict(category, "test"),
        is_truncated=False,
        reward=1.0,
        advantage=-0.5,
    )


def picture():
    out = io.BytesIO()
    Image.new("RGB", (300, 30), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


GROUPS = [[rollout("finch", Category.LESS_SPECIFIC), rollout(HOSTILE, Category.WRONG, 1)]]
IMAGES = {"birds/test/1": picture()}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.6, "0:01:00"), (3725, "1:02:05"), (86_400 + 3725, "25:02:05")]
)
def test_the_line_of_a_step_shows_the_time_left_beyond_a_day(seconds, shown):
    row = {"step": 3, "reward/mean": 0.5, "policy/grad_norm": 1.0}
    row |= {"throughput/tokens_per_s": 10.0, "time/step_s": 2.0}
    assert step_line(row, 40, seconds).endswith(f"eta {shown}")


def test_terminal_shows_a_bar_the_time_left_and_the_last_rollouts():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with live.LiveView(console, num_steps=40, step=3) as view:
        assert "eta --:--" in out.getvalue()
        view.update(4, 3725.0, GROUPS)
        console.print("step 4/40 a line above")
        view.update(5, 3600.0, [])  # a supervised step keeps the table
    text = out.getvalue()
    assert "3/40" in text
    assert "eta 1:02:05" in text
    assert "5/40" in text
    assert "rollouts of step 4" in text.rpartition("a line above")[2]
    assert "\x1b[?25h" in text.rpartition("5/40")[2]  # the cursor is back


def test_terminal_is_restored_after_an_error():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with pytest.raises(KeyError), live.LiveView(console, 2, 0):
        raise KeyError
    assert out.getvalue().count("\x1b[?25h") == 1


def test_log_has_plain_lines_only(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=100)
    with live.LiveView(console, 40, 3) as view:
        view.update(4, 60.0, GROUPS)
    assert out.getvalue() == ""
    clock = iter([0.0, 10.0, 40.0, 45.0, 80.0])
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    with live.progress(console, "base: birds", 8) as done:
        for number in (1, 2, 3, 8):
            done(number)
    assert out.getvalue() == "base: birds: 2/8 images, eta 0:02:00\n"


def test_markdown_of_hostile_answers_is_plain_text():
    text = answers_markdown(GROUPS[0])
    row = text.splitlines()[-1]
    assert "<" not in text
    assert row.replace("\\|", "").count("|") == 5  # four cells
    assert "\\!\\[x\\]" in row
    assert "less\\_specific" in text


def test_tensorboard_gets_pictures_and_answers(tmp_path):
    writer = MetricsWriter(tmp_path, -1)
    writer.write({"step": 1, "reward/mean": 0.5, "policy/kl": float("nan")})
    writer.write_rollouts(1, GROUPS, IMAGES)
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"rollouts/0" in content
    assert b"\x89PNG" in content
    assert b"scarlet finch" in content
    assert b"reward/mean" in content
    assert b"policy/kl" not in content
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["policy/kl"] is None


def test_wandb_is_off_by_default_and_named_if_missing(tmp_path, monkeypatch):
    config = Config()
    assert open_wandb(config, tmp_path) is None
    config.logging.wandb_project = "birds"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'speciarl-jax\[wandb\]'"):
        open_wandb(config, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config()
    config.logging.wandb_project = "birds"
    writer = MetricsWriter(tmp_path, -1, open_wandb(config, tmp_path))
    writer.write({"step": 1, "reward/mean": 0.5})
    writer.write_rollouts(1, GROUPS, IMAGES)
    writer.close()
    (folder,) = pathlib.Path(tmp_path, "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 20
    while b"reward/mean" not in file.read_bytes():  # wandb's own process writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(folder.glob("files/media/table/rollouts*.json"))
