"""The endpoints that are asked: which one next, when to stop asking one, when to wait."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import JudgeDownError, Pair
from speciarl_jax.judge.remote.breaker import Breaker
from speciarl_jax.judge.remote.http import Http
from speciarl_jax.judge.remote.prompt import JudgePrompt
from speciarl_jax.judge.remote.reply import NO_KEYS, RETRY_AFTER_MAX_S, AskError, Reply
from speciarl_jax.judge.remote.request import (
    CONSTRAINTS,
    Door,
    build_body,
    list_models,
    read_labels,
    send,
)
from speciarl_jax.types import FailureKind, JsonObject

_LOG = logging.getLogger(__name__)
_CANARY = Pair("canary pair", "canary pair")
_STRAY = "Write the single word banana."
_PROBE_WAITS_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0)
_PROBE_LIMIT_S = 10.0  # for a judge that accepts and never answers
_NOTICE_S = 5.0
_MODELS_LIMIT_S = 5.0
_IDS_KEPT = 1024  # names of the latest replies, to know one that comes again


def key_source(config: JudgeConfig) -> Callable[[], Awaitable[str]] | str:
    """The API key, or a function that fetches a fresh token.

    Raises:
        ValueError: the key's variable is not set, or google-auth is not installed.
    """
    if config.mode == "replay":
        return NO_KEYS[-1]
    if config.auth == "google":
        from speciarl_jax.judge.remote.google_auth import GoogleToken

        return GoogleToken()
    if not config.api_key_env:
        return NO_KEYS[-1]
    # What was given is not shown, here and in `validate`: it may be the key itself.
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(
            "judge.api_key_env: the environment variable that it names is not set or empty"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            "judge.api_key_env: the variable that it names holds a key with spaces, line ends or "
            "letters outside ASCII, which cannot be sent; set it again"
        )
    return key


class Endpoint:
    """One server: its client, its load and its breaker."""

    def __init__(self, door: Door, config: JudgeConfig, prompt: JudgePrompt) -> None:
        """Describes a server; nothing is sent yet."""
        self.url = door.url
        self.breaker = Breaker(config.breaker_failures)
        self.num_in_flight = 0
        self.hold_until = 0.0
        self.probe_limit_s = _PROBE_LIMIT_S
        self._config = config
        self._prompt = prompt
        self._door = door
        self._constraint = "" if config.structured == "auto" else config.structured
        self._thinking = config.thinking
        self._negotiation: asyncio.Task[AskError | None] | None = None
        self._num_waiting = 0
        self._num_same = 0
        self._ids: collections.OrderedDict[str, None] = collections.OrderedDict()

    async def ask(self, pairs: list[Pair]) -> Reply | AskError:
        """Asks about normalised pairs; on an endpoint's first use finds out what it can do."""
        if not self._constraint and (error := await self._negotiated()) is not None:
            return error
        body = build_body(self._config, self._prompt, pairs, self._constraint, self._thinking)
        reply = await self._send(body, len(pairs))
        # A gateway that caches may give a probe's old reply, which is a good one.
        if isinstance(reply, Reply) and self._is_old(reply.id) and pairs != [_CANARY]:
            if len(self._ids) > 1:
                self._door.http.distrust(self.url)
            self._door.http.retire()
            message = "reply has the id of an earlier one: it answers another request"
            return AskError(FailureKind.SERVER, message)
        return reply

    def _is_old(self, name: str) -> bool:
        """True if a server that numbers its replies gives a number again.

        One that gives all of them one name is asked once more, and then believed.
        """
        is_known = bool(name) and name in self._ids
        self._ids[name] = None
        if len(self._ids) > _IDS_KEPT:
            self._ids.popitem(last=False)
        if not is_known or len(self._ids) > 1:
            return is_known
        self._num_same += 1
        return self._num_same == 1

    async def _send(self, body: JsonObject, num_pairs: int) -> Reply | AskError:
        """One request with the limits of the configuration."""
        return await send(self._door, body, self._config.timeout_s, num_pairs)

    async def models(self) -> list[str]:
        """The names under which it serves models; empty if it does not say."""
        return await list_models(self._door, min(self._config.timeout_s, _MODELS_LIMIT_S))

    async def _negotiated(self) -> AskError | None:
        """Waits for what is known about the server after one attempt, made for all who wait."""
        if self._negotiation is None or self._negotiation.done():
            self._negotiation = asyncio.create_task(self._negotiate())
        task = self._negotiation
        self._num_waiting += 1
        try:
            error = await asyncio.shield(task)
            # No pair was asked about, so none is to blame.
            return error and dataclasses.replace(error, is_of_endpoint=True)
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                task.cancel()

    async def _negotiate(self) -> AskError | None:
        """Tries the ways to constrain a reply, best first, and keeps the first that works.

        A server may accept a field it does not know and ignore it, so the test is a request for
        a word that the constraint forbids.
        """
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
            reply = await self._send(body, 1)
            if isinstance(reply, Reply):
                is_held = constraint == "none" or read_labels(self._prompt, reply, 1) is not None
                self._thinking = thinking if is_held else self._thinking
                return is_held
            if reply.is_retryable or reply.is_hard:
                return reply
        return reply if constraint == "none" and isinstance(reply, AskError) else False

    async def probe(self) -> AskError | None:
        """Asks a question with a known answer; None if the judge labels it in time."""
        limit = min(self._config.timeout_s, self.probe_limit_s)
        try:
            reply = await asyncio.wait_for(self.ask([_CANARY]), timeout=limit)
        except TimeoutError:
            return AskError(FailureKind.TIMEOUT, f"no reply to a probe within {limit:g} s")
        if isinstance(reply, AskError):
            return reply
        if read_labels(self._prompt, reply, 1) is None:
            return AskError(FailureKind.UNPARSABLE, f"judge {reply.trouble}")
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
        self._http: Http | None = None
        self._changed = asyncio.Event()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._down_since: float | None = None
        self.pause_s = 0.0
        self.probe_waits_s = _PROBE_WAITS_S

    def open(self, urls: Sequence[str]) -> None:
        """Makes the endpoints, all taken to be alive; they share one pool of connections."""
        self._http = Http(is_tls=any(url.startswith("https://") for url in urls))
        for url in urls:
            door = Door(self._http, url, self._api_key)
            self.endpoints.append(Endpoint(door, self._config, self._prompt))

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
            errors = await self._first_answer()
            if not errors:
                return
            is_final = all(
                "HTTP" in e.message and (e.is_hard or not e.is_retryable) for e in errors
            )
            if is_final or time.monotonic() > until:
                both = zip(self.endpoints, errors, strict=True)
                reasons = "; ".join(f"{endpoint.url}: {error.message}" for endpoint, error in both)
                raise JudgeError(
                    f"judge does not answer ({reasons}); check judge.endpoints, judge.model"
                    f"{await self._offered()} and judge.api_key_env, and that the server runs"
                )
            await asyncio.sleep(0.5)

    async def _first_answer(self) -> list[AskError]:
        """Probes all endpoints at once; empty as soon as one labels, else everybody's errors."""
        probes = [asyncio.create_task(endpoint.probe()) for endpoint in self.endpoints]
        try:
            for probe in asyncio.as_completed(probes):
                if await probe is None:
                    return []
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        return [error for task in probes if (error := task.result()) is not None]

    async def _offered(self) -> str:
        """The models that the endpoints say they serve, as half a sentence."""
        lists = await asyncio.gather(*(endpoint.models() for endpoint in self.endpoints))
        names = list(dict.fromkeys(name for names in lists for name in names))
        if not names or self._config.model_name in names:
            return ""
        return f" (now {self._config.model_name!r}; served: {', '.join(names[:5])})"

    async def close(self) -> None:
        """Stops the probes and ends the connections."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        if self._http is not None:
            await self._http.close()
