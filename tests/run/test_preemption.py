"""What a stop does: a flag, an exception while nothing is to be saved, an end on the second one."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from speciarl_jax.cli import main
from speciarl_jax.errors import Interrupted, Preempted
from speciarl_jax.run.preemption import StepAbandoned, StopFlag, stop_signal


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGTERM, Preempted, 75), (signal.SIGINT, Interrupted, 130)],
)
def test_a_stop_sets_the_flag_and_chooses_the_exit_code(number, kind, code):
    before = signal.getsignal(number)
    with stop_signal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.is_set
        with pytest.raises(StepAbandoned):
            stop.check()
        error = stop.error(" after step 3", is_resumed=True)
    assert (type(error), error.exit_code, error.is_resumed) == (kind, code, True)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_there_is_nothing_to_save_a_stop_raises_where_it_comes(number):
    with stop_signal() as stop:
        with pytest.raises(StepAbandoned), stop.at_once(), contextlib.suppress(Exception):
            os.kill(os.getpid(), number)  # no library's handler swallows it
        assert not stop.is_at_once


def test_a_stop_that_came_before_is_not_forgotten():
    with pytest.raises(StepAbandoned), StopFlag(is_set=True).at_once():
        pass


def test_in_another_thread_the_signals_are_left_alone():
    seen = []

    def body():
        with stop_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


SCRIPT = """
import os, signal
from speciarl_jax.run.preemption import stop_signal
with stop_signal() as stop:
    for _ in range({count}):
        os.kill(os.getpid(), signal.SIGINT)
    print("alive", stop.is_set)
"""


@pytest.mark.parametrize(("count", "code", "out"), [(1, 0, "alive True\n"), (2, 130, "")])
def test_a_second_ctrl_c_ends_the_process_at_once(count, code, out):
    command = [sys.executable, "-c", SCRIPT.format(count=count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, out)
    assert "Ctrl-C again ends it at once" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "is_resumed", "expected"),
    [
        (["train", "--overwrite"], True, "speciarl train --resume"),
        (["train", "--resume"], True, "speciarl train --resume"),
        (["train", "--resume=auto"], True, "speciarl train --resume=auto"),
        (["train", "--overwrite"], False, "speciarl train --overwrite"),
        (["eval", "--workdir=a b"], False, "speciarl eval '--workdir=a b'"),
    ],
)
def test_the_command_that_goes_on(arguments, is_resumed, expected):
    assert main.goes_on(arguments, Preempted("saved", is_resumed=is_resumed)) == expected
