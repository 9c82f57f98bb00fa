"""Wall time of the parts of a step, and how a time is written."""

from __future__ import annotations

import time


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
