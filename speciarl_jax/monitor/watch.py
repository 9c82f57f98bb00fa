"""What watches a run from inside: a heartbeat file, an XProf trace of chosen steps."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import time

import jax

from speciarl_jax.files import write_whole

_BEAT_EVERY_S = 5.0
_LOG = logging.getLogger(__name__)


class Heartbeat:
    """``heartbeat.json``: the step in progress and when the process was last seen at work.

    A launcher that finds it old kills the process; the run goes on from its last checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, process: int) -> None:
        """Writes nothing yet; all processes of a job but the first have a number in the name."""
        self._path = workdir / (f"heartbeat.{process}.json" if process else "heartbeat.json")
        self._last: float | None = None

    def beat(self, step: int) -> None:
        """Notes the time, at most every five seconds; a disk that refuses is warned of."""
        now = time.monotonic()  # the clock on the wall may be set back
        if self._last is not None and now - self._last < _BEAT_EVERY_S:
            return
        self._last = now
        seen = {"step": step, "time_s": time.time(), "pid": os.getpid()}
        try:
            write_whole(self._path, json.dumps(seen) + "\n")
        except OSError as error:  # a full disk: the step in progress may still be worth its work
            _LOG.warning("no heartbeat (%s)", error)


class Profile:
    """Traces the steps ``first`` to ``last`` into ``workdir/profile``; open it with XProf."""

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None) -> None:
        """Args: the run directory; (first, last) step, or None for no trace."""
        self._folder, self._steps, self._is_on = workdir / "profile", steps, False

    def before(self, step: int) -> None:
        """Starts the trace if this is its first step, or a later one of a resumed run."""
        if self._steps is not None and not self._is_on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int) -> pathlib.Path | None:
        """Ends the trace with its last step; where it lies, if it ended now."""
        if not self._is_on or (self._steps is not None and step < self._steps[1]):
            return None
        return self.close()

    def close(self) -> pathlib.Path | None:
        """Ends a trace under way."""
        if not self._is_on:
            return None
        jax.profiler.stop_trace()
        self._is_on = False
        return self._folder


def parse_profile(text: str) -> tuple[int, int] | None:
    """``steps=3:5`` as (3, 5); "" as None.

    Raises:
        ValueError: anything else.
    """
    if not text:
        return None
    first, separator, last = text.removeprefix("steps=").partition(":")
    is_number = first.isdecimal() and last.isdecimal()
    if not (text.startswith("steps=") and separator and is_number and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile={text!r}: expected steps=FIRST:LAST, for example steps=3:5")
    return int(first), int(last)
