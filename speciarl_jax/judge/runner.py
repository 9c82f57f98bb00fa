"""The door for a synchronous trainer: a judge on an event loop of its own, in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import types
from collections.abc import Coroutine, Sequence
from typing import TypeVar

from speciarl_jax.judge.base import JudgeError, Outcome, Pair
from speciarl_jax.judge.config import JudgeConfig
from speciarl_jax.judge.vote import open_judge

_T = TypeVar("_T")


class JudgeThread:
    """Runs a judge beside the caller; labels arrive while the caller goes on decoding.

    Example:
        with JudgeThread(config) as judge:
            judge.check_health(60.0)
            future = judge.submit(pairs, step)
            ...
            outcomes = future.result()
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Starts the thread, the judge and, if the config says so, the embedded server.

        Raises:
            ValueError: a setting is impossible.
            JudgeError: a file cannot be opened, or the embedded server does not start.
        """
        self._client = open_judge(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._is_open = True
        self._thread.start()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop_loop)
            self._call(self._client.__aenter__())
            undo.pop_all()

    def _run(self) -> None:
        """Thread body."""
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _call(self, coroutine: Coroutine[object, None, _T]) -> _T:
        """Runs a coroutine on the judge's loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def submit(
        self, pairs: Sequence[Pair], step: int = 0
    ) -> concurrent.futures.Future[list[Outcome]]:
        """Starts labelling and returns at once.

        Args:
            pairs: raw text.
            step: training step, for the verdict log and the recording.

        Returns:
            A future of the outcomes, in the order of `pairs`. Its exceptions are those of
            `JudgeClient.label`.

        Raises:
            JudgeError: the judge is closed.
        """
        if not self._is_open:
            raise JudgeError("judge is closed: submit before close()")
        return asyncio.run_coroutine_threadsafe(self._client.label(list(pairs), step), self._loop)

    def label(self, pairs: Sequence[Pair], step: int = 0) -> list[Outcome]:
        """`submit`, waited for."""
        return self.submit(pairs, step).result()

    def check_health(self, deadline_s: float = 60.0) -> None:
        """Waits until an endpoint labels a probe.

        Raises:
            JudgeError: none does within `deadline_s`; at once for a refused key or model.
        """
        self._call(self._client.check_health(deadline_s))

    def stats(self) -> dict[str, float]:
        """Metrics since the start, under `judge/`."""
        return self._client.stats()

    def close(self) -> None:
        """Ends everything that was started; safe to call twice."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._call(self._client.__aexit__(None, None, None))
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        """Ends loop and thread."""
        self._is_open = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> JudgeThread:
        """Already running; returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()
