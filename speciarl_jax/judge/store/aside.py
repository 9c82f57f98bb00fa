"""Files and servers beside the event loop: one thread that waits for locks, disks and Redis.

A locked database or a server that is gone may hold a call for seconds. On the event loop that
would stop every request, and a healthy judge would look dead.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Aside:
    """Runs calls one after the other in a thread of its own."""

    def __init__(self) -> None:
        """Starts no thread before the first call."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="judge-store")

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises; the event loop goes on meanwhile.

        A caller that is cancelled leaves the call to finish.
        """
        future = self._thread.submit(function)
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Ends the thread once its calls are done."""
        self._thread.shutdown()
