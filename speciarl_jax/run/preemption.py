"""SIGTERM (a cloud's notice of pre-emption arrives as one) and Ctrl-C: save soon, exit 75 or 130.

A step can take longer than the grace period, so a stop is looked for between chunks of decoding and
while labels are awaited, in training as in scoring; the step is then abandoned and the state before
it saved. Once its update has been given to the device, a step is finished instead. While a run is
being opened there is nothing to save, and a stop ends that at once. Processes of a job stop
together: within the step if they sample together (`run.leaving`), else after it or the scoring. A
second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

from speciarl_jax.errors import EXIT_INTERRUPTED, Interrupted, Preempted, Stopped
from speciarl_jax.run.storage import RunDir

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar may have hidden it


class StepAbandoned(KeyboardInterrupt):
    """A stop was asked for and the work in progress can be left without loss of state.

    A `KeyboardInterrupt`, so that no library takes it for an error that it may swallow.
    """


@dataclasses.dataclass
class StopFlag:
    """Set by SIGTERM and by Ctrl-C.

    Attributes:
        is_set: a stop was asked for.
        is_interrupt: by Ctrl-C.
        is_at_once: the stop ends the work where it is; see `at_once`.
    """

    is_set: bool = False
    is_interrupt: bool = False
    is_at_once: bool = False

    def check(self) -> None:
        """Call where the work may be left.

        Raises:
            StepAbandoned: a stop was asked for.
        """
        if self.is_set:
            raise StepAbandoned

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While there is nothing to save: a stop raises `StepAbandoned` wherever it comes."""
        self.is_at_once = True
        try:
            self.check()
            yield
        finally:
            self.is_at_once = False

    def error(self, message: str, *, is_resumed: bool = False) -> Stopped:
        """What ends the command: `message` says what was saved."""
        kind = Interrupted if self.is_interrupt else Preempted
        who = "Ctrl-C" if self.is_interrupt else "signal"
        return kind(f"stopped by {who}{message}", is_resumed=is_resumed)


@contextlib.contextmanager
def stop_signal() -> Iterator[StopFlag]:
    """Turns SIGTERM and Ctrl-C into a flag, for the main thread; elsewhere it stays unset."""
    flag = StopFlag()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            if flag.is_interrupt:
                end_now()
            flag.is_interrupt = True
            sys.stderr.write("\nstopping; Ctrl-C again ends it at once, without saving\n")
        flag.is_set = True
        if flag.is_at_once:
            raise StepAbandoned

    with contextlib.ExitStack() as restored:
        # In another thread the signals are the caller's.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                restored.callback(signal.signal, number, signal.signal(number, handle))
        yield flag


@contextlib.contextmanager
def told_stop(run_dir: RunDir, stop: StopFlag) -> Iterator[None]:
    """A stop that nobody has caught, as an error that says where to go on.

    Raises:
        Stopped: instead of `StepAbandoned`.
    """
    try:
        yield
    except StepAbandoned:
        where, is_resumed = run_dir.checkpoints.parent, run_dir.holds_run()
        what = ", saved in" if is_resumed else " before there was anything to save in"
        raise stop.error(f"{what} {where}", is_resumed=is_resumed) from None


def end_now() -> None:
    """Ends the process as it is; a file that is being written stays beside the whole one."""
    sys.stderr.write((_SHOW_CURSOR if sys.stderr.isatty() else "") + "ended at once\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
