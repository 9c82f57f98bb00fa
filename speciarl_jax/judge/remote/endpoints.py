"""The endpoints that are asked: which one next, when to stop asking one, when to wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import openai

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import JudgeDownError, Pair
from speciarl_jax.judge.remote.prompt import JudgePrompt
from speciarl_jax.judge.remote.request import (
    CONSTRAINTS,
    RETRY_AFTER_MAX_S,
    AskError,
    Reply,
    build_body,
    read_labels,
    send,
)
from speciarl_jax.types import FailureKind


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


_LOG = logging.getLogger(__name__)
_CANARY = Pair("canary pair", "canary pair")
_STRAY = "Write the single word banana."
_PROBE_WAITS_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0)
_PROBE_LIMIT_S = 10.0  # for a judge that accepts and never answers
_NOTICE_S = 5.0
_LOOPBACK = ("127.0.0.1", "localhost")


def key_source(config: JudgeConfig) -> Callable[[], Awaitable[str]] | str:
    """The API key, or a function that fetches a fresh token.

    Raises:
        ValueError: the key's variable is not set, or google-auth is not installed.
    """
    if config.mode == "replay":
        return "none"
    if config.auth == "google":
        from speciarl_jax.judge.remote.google_auth import GoogleToken

        return GoogleToken()
    key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
    if not key:
        raise ValueError(
            f"judge.api_key_env={config.api_key_env!r}: this environment variable is not set"
        )
    return key


class Endpoint:
    """One server: its client, its load and its breaker."""

    def __init__(
        self, url: str, config: JudgeConfig, prompt: JudgePrompt, client: openai.AsyncOpenAI
    ) -> None:
        """Describes a server at `url`; nothing is sent yet."""
        self.url = url
        self.breaker = Breaker(config.breaker_failures)
        self.num_in_flight = 0
        self.hold_until = 0.0
        self._config = config
        self._prompt = prompt
        self._client = client
        self._constraint = "" if config.structured == "auto" else config.structured
        self._thinking = config.thinking
        self._lock = asyncio.Lock()

    async def ask(self, pairs: list[Pair]) -> Reply | AskError:
        """Asks about normalised pairs; on an endpoint's first use finds out what it can do."""
        if not self._constraint and (error := await self._negotiate()) is not None:
            return error
        body = build_body(self._config, self._prompt, pairs, self._constraint, self._thinking)
        return await send(self._client, body, self._config.timeout_s)

    async def _negotiate(self) -> AskError | None:
        """Tries the ways to constrain a reply, best first, and keeps the first that works.

        A server may accept a field it does not know and ignore it, so the test is a request for
        a word that the constraint forbids.
        """
        async with self._lock:
            if self._constraint:
                return None
            for constraint in CONSTRAINTS:
                if constraint == "choice" and self._prompt.is_batch:
                    continue  # it constrains one label
                result = await self._try_constraint(constraint)
                if isinstance(result, AskError):
                    return result
                if result:
                    self._constraint = constraint
                    _LOG.info("judge %s: constrained output by %s", self.url, constraint)
                    return None
        raise AssertionError("unreachable: an unconstrained request always counts as working")

    async def _try_constraint(self, constraint: str) -> bool | AskError:
        """True if the server holds its model to `constraint`; `none` always does.

        Strict servers refuse the field that turns thinking off, so each is tried without it too.
        """
        reply: Reply | AskError
        for thinking in dict.fromkeys((self._thinking, "default")):
            body = build_body(self._config, self._prompt, [_CANARY], constraint, thinking)
            if constraint != "none":
                body["messages"] = [{"role": "user", "content": _STRAY}]
            reply = await send(self._client, body, self._config.timeout_s)
            if isinstance(reply, Reply):
                is_held = constraint == "none" or read_labels(self._prompt, reply, 1) is not None
                self._thinking = thinking if is_held else self._thinking
                return is_held
            if reply.is_retryable or reply.is_hard:
                return reply
        return reply if constraint == "none" and isinstance(reply, AskError) else False

    async def probe(self) -> AskError | None:
        """Asks a question with a known answer; None if the judge labels it in time."""
        limit = min(self._config.timeout_s, _PROBE_LIMIT_S)
        try:
            reply = await asyncio.wait_for(self.ask([_CANARY]), timeout=limit)
        except TimeoutError:
            return AskError(FailureKind.TIMEOUT, f"no reply to a probe within {limit:g} s")
        if isinstance(reply, AskError):
            return reply
        if read_labels(self._prompt, reply, 1) is None:
            message = f"replies with no category: {reply.text[:60]!r}"
            return AskError(FailureKind.UNPARSABLE, message)
        return None


class EndpointPool:
    """Chooses an endpoint for each request, and waits visibly while there is none."""

    def __init__(self, config: JudgeConfig, prompt: JudgePrompt) -> None:
        """Finds the key; there are no endpoints before `open`.

        Raises:
            ValueError: see `key_source`.
        """
        self.endpoints: list[Endpoint] = []
        self._config = config
        self._prompt = prompt
        self._api_key = key_source(config)
        self._http: openai.DefaultAioHttpClient | None = None
        self._changed = asyncio.Event()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._down_since: float | None = None
        self.pause_s = 0.0
        self.probe_waits_s = _PROBE_WAITS_S

    def open(self, urls: Sequence[str]) -> None:
        """Makes the endpoints, all taken to be alive; they share one HTTP client."""
        for name in ("httpx", "httpx2"):  # they log every request at INFO: thousands a step
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.WARNING)
        is_local = all(url.split("/")[2].split(":")[0] in _LOOPBACK for url in urls)
        # openai's aiohttp transport; no proxy on the way to ourselves.
        self._http = openai.DefaultAioHttpClient(trust_env=not is_local)
        for url in urls:
            client = openai.AsyncOpenAI(
                base_url=url, api_key=self._api_key, max_retries=0, http_client=self._http
            )
            self.endpoints.append(Endpoint(url, self._config, self._prompt, client))

    @property
    def num_successes(self) -> int:
        """Answers received from any endpoint."""
        return sum(endpoint.breaker.num_successes for endpoint in self.endpoints)

    @property
    def num_up(self) -> int:
        """Endpoints in use."""
        return sum(not endpoint.breaker.is_open for endpoint in self.endpoints)

    async def acquire(self) -> Endpoint:
        """The least loaded live endpoint, its load counted up; waits while none is live.

        Raises:
            JudgeDownError: none came back within the pause budget.
        """
        while True:
            live = [endpoint for endpoint in self.endpoints if not endpoint.breaker.is_open]
            if live:
                chosen = min(live, key=lambda endpoint: endpoint.num_in_flight)
                chosen.num_in_flight += 1
                return chosen
            await self._await_change()

    async def _await_change(self) -> None:
        """Waits for an endpoint to return, no longer than the pause budget."""
        if self._down_since is None:
            self._down_since = time.monotonic()
        for endpoint in self.endpoints:
            self._start_probe(endpoint)
        left = self._down_since + self._config.pause_budget_s - time.monotonic()
        if left <= 0:
            reasons = "; ".join(f"{e.url}: {e.breaker.reason}" for e in self.endpoints)
            raise JudgeDownError(
                f"judge down for {self._config.pause_budget_s:g} s ({reasons}); everything "
                "labelled so far is in the cache: bring the judge back and start again, or raise "
                "judge.pause_budget_s"
            )
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout=left)

    def renew(self) -> None:
        """Grants a fresh pause budget: somebody asks again after the judge was given up."""
        self._down_since = None

    def release(self, endpoint: Endpoint, error: AskError | None) -> None:
        """Counts a request as over; `error` says why there is no reply, None if there is one."""
        num_in_flight = endpoint.num_in_flight
        endpoint.num_in_flight -= 1
        if error is None or not (error.is_retryable or error.is_hard):
            endpoint.breaker.record_success()  # it answered, if only to refuse this very pair
            self._rejoin(endpoint)
            return
        is_hard = error.is_hard
        if error.retry_after_s > RETRY_AFTER_MAX_S:
            endpoint.hold_until, is_hard = time.monotonic() + error.retry_after_s, True
        if endpoint.breaker.record_failure(error.message, num_in_flight, is_hard):
            _LOG.warning("judge %s set aside: %s", endpoint.url, error.message)
            self._start_probe(endpoint)

    def _start_probe(self, endpoint: Endpoint) -> None:
        """Begins to look after an endpoint that is set aside."""
        running = self._probes.get(endpoint.url)
        if endpoint.breaker.is_open and (running is None or running.done()):
            self._probes[endpoint.url] = asyncio.create_task(self._watch(endpoint))

    async def _watch(self, endpoint: Endpoint) -> None:
        """Probes an endpoint until it labels again or the pause budget is spent."""
        started = noticed = time.monotonic()
        attempt = 0
        while endpoint.breaker.is_open:
            wait = max(
                self.probe_waits_s[min(attempt, len(self.probe_waits_s) - 1)],
                min(endpoint.hold_until - time.monotonic(), _NOTICE_S),
            )
            await asyncio.sleep(wait)
            now = time.monotonic()
            if now - noticed >= _NOTICE_S:
                noticed = now
                self._notice(endpoint, now - started)
            if now < endpoint.hold_until:
                continue
            attempt += 1
            error = await endpoint.probe()
            if error is None:
                self._rejoin(endpoint)
            else:
                endpoint.breaker.reason = error.message
                if self._down_since and now - self._down_since > self._config.pause_budget_s:
                    return

    def _notice(self, endpoint: Endpoint, waited_s: float) -> None:
        """Says that the run is waiting, and for what."""
        state = "paused" if self.num_up == 0 else f"goes on with {self.num_up} endpoints"
        _LOG.warning(
            "judge %s: %s for %.0f s (%s); stops after %.0f s without a judge",
            state, endpoint.url, waited_s, endpoint.breaker.reason, self._config.pause_budget_s,
        )  # fmt: skip

    def _rejoin(self, endpoint: Endpoint) -> None:
        """Takes an endpoint back into use, unless a probe or a late reply has done so already."""
        if not endpoint.breaker.is_open:
            return
        endpoint.breaker.close()
        if self._down_since is not None:
            self.pause_s += time.monotonic() - self._down_since
            self._down_since = None
        self._changed.set()
        _LOG.warning("judge %s is back", endpoint.url)

    async def check(self, deadline_s: float) -> None:
        """Waits until an endpoint labels a probe.

        Raises:
            JudgeError: none did within `deadline_s`; at once for a refused key or model.
        """
        until = time.monotonic() + deadline_s
        while True:
            found = [await endpoint.probe() for endpoint in self.endpoints]
            if any(error is None for error in found):
                return
            errors = [error for error in found if error is not None]
            is_final = all(
                "HTTP" in e.message and (e.is_hard or not e.is_retryable) for e in errors
            )
            if is_final or time.monotonic() > until:
                both = zip(self.endpoints, errors, strict=True)
                reasons = "; ".join(f"{endpoint.url}: {error.message}" for endpoint, error in both)
                raise JudgeError(
                    f"judge does not answer ({reasons}); check judge.endpoints, judge.model and "
                    "judge.api_key_env, and that the server runs"
                )
            await asyncio.sleep(0.5)

    async def close(self) -> None:
        """Stops the probes and ends the connections."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
