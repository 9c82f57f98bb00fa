"""When an endpoint is no longer asked: after a run of failures with no answer in between."""

from __future__ import annotations


class Breaker:
    """Opens after a run of failures with no success in between; a probe closes it again.

    The run must be at least `threshold` long and at least as long as the number of requests in
    flight: a bad minute of a busy judge is not an outage, a whole round of failures is. A refused
    connection or a refused key opens it at once.
    """

    def __init__(self, threshold: int) -> None:
        """Starts closed; `threshold` failures in a row open it."""
        self._threshold = threshold
        self._failures_in_a_row = 0
        self.is_open = False
        self.reason = ""
        self.num_successes = 0

    def record_success(self) -> None:
        """An answer came back. While open, only `close` (after a probe) closes it."""
        self._failures_in_a_row = 0
        self.num_successes += 1

    def record_failure(self, reason: str, num_in_flight: int, is_hard: bool = False) -> bool:
        """A request failed; returns True if this failure opened it.

        Args:
            reason: one line, shown while the breaker is open.
            num_in_flight: requests under way at this endpoint.
            is_hard: certain evidence of an outage; opens at once.
        """
        self._failures_in_a_row += 1
        is_run = self._failures_in_a_row >= max(self._threshold, num_in_flight)
        if self.is_open or not (is_hard or is_run):
            return False
        self.is_open = True
        self.reason = reason
        return True

    def close(self) -> None:
        """A probe succeeded: requests may go out again."""
        self.is_open = False
        self.record_success()
