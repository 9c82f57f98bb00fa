"""`speciarl sample`: answers appear as they finish, one line each in a log."""

import io

import numpy as np
import pytest
from rich.console import Console

from speciarl_jax.cli.main import main
from speciarl_jax.cli.sample import print_answers
from speciarl_jax.data.field_guide.specimens import draw_specimens, encode_png
from speciarl_jax.monitor.tables import make_console
from speciarl_jax.rollout.finished import FinishedRow

TEXTS = {1: "<think>" + "so long " * 30 + "</think><answer>red [finch]</answer>", 2: "no idea"}


def row(sample, token, is_truncated=False):
    logprobs = np.float32([-1.5])
    return FinishedRow(0, sample, np.int32([token]), logprobs, is_truncated)


def test_answers_are_printed_while_others_decode():
    out = io.StringIO()

    def finished():
        yield [row(3, 1)]
        assert "red [finch]" in out.getvalue()
        assert "no answer" not in out.getvalue()
        yield [row(0, 2, is_truncated=True)]

    print_answers(Console(file=out, soft_wrap=True), finished(), lambda tokens: TEXTS[tokens[0]])
    assert out.getvalue().splitlines() == [
        "4  red [finch]  logprob -1.50",
        TEXTS[1],
        "1  (no answer)  logprob -1.50  cut off by --max_tokens",
        "no idea",
    ]


@pytest.mark.slow
def test_the_shipped_policy_answers(tmp_path, capsys):
    image = tmp_path / "bird.png"
    image.write_bytes(encode_png(draw_specimens("bird", "test", 4)[0]))
    assert main(["sample", f"--image={image}", "--n=3", "--max_tokens=48"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert sorted(line[0] for line in lines[::2]) == ["1", "2", "3"]
    assert all("<answer>" in line for line in lines[1::2])
    assert make_console().soft_wrap
