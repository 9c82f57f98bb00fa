"""Requests and tokens per minute: two leaky meters, shared out over the hosts of a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class RateLimiter:
    """Spaces requests so that neither limit is passed; a burst of one second is allowed.

    Each meter is the time at which its account is even again (the generic cell rate algorithm):
    a request of cost c moves it by 60 c / limit seconds, and waits while it lies more than the
    burst ahead of now. First come, first served.

    Source: own; GCRA as in ATM traffic management (ITU-T I.371).
    """

    def __init__(
        self,
        requests_per_minute: float,
        tokens_per_minute: float,
        clock: Callable[[], float] = time.monotonic,
        burst_s: float = 1.0,
    ) -> None:
        """Sets the limits of this host; 0 means none.

        Args:
            tokens_per_minute: of prompt and reply together.
            clock: seconds, monotonic.
            burst_s: how many seconds' worth may pass at once.
        """
        self._limits = (requests_per_minute, tokens_per_minute)
        self._even_at = [float("-inf"), float("-inf")]
        self._clock = clock
        self._burst_s = burst_s
        self.waited_s = 0.0

    def reserve(self, tokens: float) -> float:
        """Books one request of `tokens` tokens; returns seconds to wait before sending it."""
        now, wait = self._clock(), 0.0
        for index, cost in enumerate((1.0, tokens)):
            if self._limits[index] <= 0:
                continue
            start = max(self._even_at[index], now - self._burst_s)
            self._even_at[index] = start + 60.0 * cost / self._limits[index]
            wait = max(wait, start - now)
        return wait

    def correct(self, tokens: float) -> None:
        """Adds tokens (or takes back, if negative) that the estimate had missed."""
        if self._limits[1] > 0:
            self._even_at[1] += 60.0 * tokens / self._limits[1]

    async def acquire(self, tokens: float) -> None:
        """Waits until a request of `tokens` tokens may be sent."""
        wait = self.reserve(tokens)
        if wait > 0:
            self.waited_s += wait
            await asyncio.sleep(wait)
