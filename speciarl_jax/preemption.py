"""SIGTERM becomes a flag that the loop reads between steps."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import types
from collections.abc import Iterator


class Preempted(RuntimeError):
    """SIGTERM came; the run is saved and goes on with --resume. Exit code 75."""


@dataclasses.dataclass
class StopFlag:
    """Set by SIGTERM; read between steps."""

    is_set: bool = False


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
