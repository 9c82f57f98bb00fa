"""Wall time of the parts of a step and of a run, how it is written, and what jax compiles."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Mapping

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_PARTS = ("rollout", "judge", "update", "data")


def format_seconds(seconds: float) -> str:
    """``1:02:03``; days are hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Clock:
    """Adds up seconds by name; what lies between two laps belongs to the second one's name."""

    def __init__(self) -> None:
        """Starts now."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends a part called `name`; parts of the same name add up."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """Seconds of each part, and of the step without its wait for data."""
        parts = dict(self._laps)
        waited = parts.pop("data", 0.0)
        total = time.perf_counter() - self._start - waited
        return {**{f"time/{name}_s": s for name, s in parts.items()}, "time/step_s": total}


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
def _compilations() -> dict[int, list[float]]:
    """Seconds of each compilation by thread, from the first call on; jax is imported here only."""
    import jax

    durations: dict[int, list[float]] = collections.defaultdict(list)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            durations[threading.get_ident()].append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


def num_compiled() -> int:
    """Programs compiled by this thread since the process first asked for compilations.

    By thread, so that a room can prove that it compiles nothing while others do. A program that
    comes out of the persistent cache counts too: its run had to wait for it.
    """
    return len(_compilations()[threading.get_ident()])


def compile_seconds() -> float:
    """Seconds this process has spent compiling since it first asked for compilations."""
    return sum(sum(durations) for durations in list(_compilations().values()))
