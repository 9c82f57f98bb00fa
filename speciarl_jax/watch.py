"""What watches a run from inside: a heartbeat file, an XProf trace of chosen steps, goodput."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import time
from collections.abc import Mapping

import jax

_BEAT_EVERY_S = 5.0
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_PARTS = ("rollout", "judge", "update", "data")


class Heartbeat:
    """``heartbeat.json``: the step in progress and when the process was last seen at work.

    A launcher that finds it old kills the process; the run goes on from its last checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, process: int) -> None:
        """Writes nothing yet.

        Args:
            workdir: run directory, which the processes of a job share.
            process: number of this one; all but the first have it in their file's name.
        """
        self._path = workdir / (f"heartbeat.{process}.json" if process else "heartbeat.json")
        self._last = 0.0

    def beat(self, step: int) -> None:
        """Notes the time, at most every five seconds."""
        now = time.time()
        if now - self._last < _BEAT_EVERY_S:
            return
        self._last = now
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "time_s": now, "pid": os.getpid()}) + "\n")
        temporary.replace(self._path)


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


class Goodput:
    """Shares of the wall time since the start that each part of a run has taken."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()
        self._compiled = compile_seconds()
        self._seconds = dict.fromkeys((*_PARTS, "checkpoint"), 0.0)

    def add_checkpoint(self, seconds: float) -> None:
        """Counts time that saving kept the loop from its next step."""
        self._seconds["checkpoint"] += seconds

    def metrics(self, row: Mapping[str, float]) -> dict[str, float]:
        """Counts a step and returns the shares so far.

        Args:
            row: its metrics with ``time/<part>_s``.

        Returns:
            ``goodput/<part>_frac``; ``compile`` lies within the other parts.
        """
        for part in _PARTS:
            self._seconds[part] += row.get(f"time/{part}_s", 0.0)
        wall = time.perf_counter() - self._start
        seconds = {**self._seconds, "compile": compile_seconds() - self._compiled}
        return {f"goodput/{name}_frac": value / wall for name, value in seconds.items()}


@functools.cache
def _compilations() -> list[float]:
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


def compile_seconds() -> float:
    """Seconds this process has spent compiling since the first call of this function."""
    return sum(_compilations())
