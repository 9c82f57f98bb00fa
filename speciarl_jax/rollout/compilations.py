"""Counts what jax compiles, thread by thread, so that a room can prove that it compiles nothing."""

from __future__ import annotations

import collections
import functools
import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@functools.cache
def _counts() -> collections.Counter[int]:
    counts: collections.Counter[int] = collections.Counter()

    def listen(event: str, duration_s: float, **_: str | int) -> None:
        if event == _EVENT:
            counts[threading.get_ident()] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counts


def num_compiled() -> int:
    """Programs compiled by this thread since the first call of this function in the process.

    A program that comes out of the persistent cache counts too: its run had to wait for it.
    """
    return _counts()[threading.get_ident()]
