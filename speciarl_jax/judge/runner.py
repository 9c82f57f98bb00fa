"""The door for a synchronous trainer: a judge on an event loop of its own, in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from anyio.from_thread import start_blocking_portal

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Outcome, Pair
from speciarl_jax.judge.store.verdict_log import VerdictLog
from speciarl_jax.judge.vote import make_judge

_JUDGE_STARTUP_S = 60.0


class JudgeThread(contextlib.AbstractContextManager["JudgeThread"]):
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
        self._client = make_judge(config)
        with contextlib.ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(name="judge"))
            self._loop = portal.call(asyncio.get_running_loop)
            stack.enter_context(portal.wrap_async_context_manager(self._client))
            self._stack = stack.pop_all()
        self._is_open = True

    def submit(
        self, pairs: Sequence[Pair], step: int = 0
    ) -> concurrent.futures.Future[list[Outcome]]:
        """Starts labelling and returns at once.

        Returns:
            A future that ends as `JudgeClient.label` does.

        Raises:
            JudgeError: the judge is closed.
        """
        if not self._is_open:
            raise JudgeError("judge is closed: submit before close()")
        # Not by the portal, which waits until the loop has started the task: 10 ms if it is busy.
        return asyncio.run_coroutine_threadsafe(self._client.label(list(pairs), step), self._loop)

    def label(self, pairs: Sequence[Pair], step: int = 0) -> list[Outcome]:
        """`submit`, waited for."""
        return self.submit(pairs, step).result()

    def check_health(self, deadline_s: float = 60.0) -> None:
        """`JudgeClient.check_health`, waited for."""
        health = self._client.check_health(deadline_s)
        asyncio.run_coroutine_threadsafe(health, self._loop).result()

    def stats(self) -> dict[str, float]:
        """Metrics since the start, under `judge/`."""
        return self._client.stats()

    def close(self) -> None:
        """Ends everything that was started; safe to call twice."""
        self._is_open = False
        self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_judge(
    judge: JudgeConfig, workdir: pathlib.Path, step: int, process: int = 0, num_processes: int = 1
) -> JudgeThread:
    """Starts the judge with its cache and verdict log in the work directory.

    Args:
        judge: settings; a cache or log that they name elsewhere stays there.
        workdir: run directory.
        step: the log is cut back to it.
        process: its number; each process has its own files.
        num_processes: of the job; they share the judge's limits.

    Raises:
        JudgeError: nobody answers; one line with the place.
    """
    own = f".{process}" if process else ""
    judge = dataclasses.replace(
        judge,
        cache_path=judge.cache_path or str(workdir / f"judge_cache{own}.sqlite"),
        log_path=judge.log_path or str(workdir / f"verdicts{own}.sqlite"),
        num_hosts=max(judge.num_hosts, num_processes),
    )
    if pathlib.Path(judge.log_path).is_file():
        with contextlib.closing(VerdictLog(judge.log_path)) as log:
            log.cut_back(step)
    with contextlib.ExitStack() as undo:
        thread = undo.enter_context(JudgeThread(judge))
        thread.check_health(_JUDGE_STARTUP_S)
        undo.pop_all()
    return thread
