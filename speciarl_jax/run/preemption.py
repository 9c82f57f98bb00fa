"""SIGTERM, and a cloud's notice of pre-emption, which arrives as one: save soon, exit with 75.

A step can take longer than the grace period, so a stop is looked for between chunks of decoding and
while labels are awaited; the step is then abandoned and the state before it saved. Once its update
has been given to the device, a step is finished instead. In a job of several processes all of them
stop together, after the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import types
from collections.abc import Iterator


class StepAbandoned(Exception):
    """A stop was asked for and the step can be left without loss of state."""


@dataclasses.dataclass
class StopFlag:
    """Set by SIGTERM."""

    is_set: bool = False

    def check(self) -> None:
        """Call where the step may be left.

        Raises:
            StepAbandoned: a stop was asked for.
        """
        if self.is_set:
            raise StepAbandoned


@contextlib.contextmanager
def stop_signal() -> Iterator[StopFlag]:
    """Turns SIGTERM into a flag while the loop runs (main thread only, else it stays unset)."""
    flag = StopFlag()

    def handle(number: int, frame: types.FrameType | None) -> None:
        flag.is_set = True

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: the caller owns the signals
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)
