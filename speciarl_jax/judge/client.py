"""The judge's client: what happens to a pair between the rollout and its label.

    normalise -> recording -> exact / synonym -> cache -> same pair in flight -> ask -> cache

Asking goes through a queue served by at most `concurrency` workers. A request that fails goes
back into the queue after a jittered wait; it costs the pair one of its retries only if the judge
has answered somebody else in the meantime (a probe too), for otherwise the judge is out and not the
pair, and an outage is waited for (see `EndpointPool`), never turned into failures. A refused
connection or key costs no retry, but a pair that meets nothing else is given up too once the pause
budget, counted from its own first refusal, is spent: nothing is asked for ever.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
from collections.abc import Sequence
from functools import partial

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Outcome, Pair, as_cached, failure, spread
from speciarl_jax.judge.cascade import Cascade, as_seen
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.parse import normalize
from speciarl_jax.judge.remote.endpoints import Endpoint, EndpointPool
from speciarl_jax.judge.remote.limiter import RateLimiter
from speciarl_jax.judge.remote.prompt import load_prompt
from speciarl_jax.judge.remote.reply import RETRY_AFTER_MAX_S, AskError, Reply
from speciarl_jax.judge.remote.request import read_labels
from speciarl_jax.judge.remote.stats import ClientStats
from speciarl_jax.judge.store.aside import Aside
from speciarl_jax.judge.store.cache import KeyMaker, open_cache
from speciarl_jax.judge.store.recording import Recording
from speciarl_jax.judge.store.verdict_log import VerdictLog
from speciarl_jax.types import Category, FailureKind, Verdict


@dataclasses.dataclass(eq=False)
class _Ask:
    """A pair that waits for its label; everybody who wants that label awaits `future`."""

    key: bytes
    pair: Pair
    future: asyncio.Future[Outcome]


@dataclasses.dataclass(eq=False)
class _Job:
    """One request to make: a pair, or several with a batch prompt.

    `strikes` are failures that may be the pair's fault, `refusals` those of the endpoint alone;
    either counts only if the judge has answered since the last one.
    """

    asks: list[_Ask]
    strikes: int = 0
    refusals: int = 0
    refused_since: float | None = None
    attempts: int = 0
    unparsable: int = 0
    seen_successes: int = -1


class JudgeClient:
    """Labels pairs through OpenAI-compatible endpoints; an asynchronous context manager.

    Example:
        async with JudgeClient(config) as judge:
            outcomes = await judge.label(pairs)
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Checks the settings; files, servers and connections open on entry.

        Raises:
            ValueError: a setting is impossible.
        """
        config.validate()
        self._config = config
        self._prompt = load_prompt(config.prompt)
        if config.pairs_per_request > 1 and not self._prompt.is_batch:
            raise ValueError(
                f"judge.pairs_per_request={config.pairs_per_request} needs a batch prompt: set "
                f"judge.prompt=six_way_batch_v2 (now {config.prompt})"
            )
        self._pool = EndpointPool(config, self._prompt)
        self._keys = KeyMaker(
            model=config.model_name, revision=config.revision, prompt=self._prompt.fingerprint,
            temperature=config.temperature, structured=config.structured,
            thinking=config.thinking, max_reply_tokens=config.max_reply_tokens,
        )  # fmt: skip
        self._cascade = Cascade(config.synonyms)
        self._stats = ClientStats()
        self._jitter = random.Random()
        self._queue: collections.deque[_Job] = collections.deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._in_flight: dict[bytes, _Ask] = {}
        self._max_workers = max(1, config.concurrency // config.num_hosts)
        self._limiter = RateLimiter(
            config.requests_per_minute / config.num_hosts,
            config.tokens_per_minute / config.num_hosts,
        )
        self._recording: Recording | None = None
        self._server: LocalJudgeServer | None = None
        self._is_closed = False
        self._aside = Aside()
        self._unwritten: list[tuple[_Ask, Category]] = []  # labels that are not durable yet
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> JudgeClient:
        """Opens cache, log, recording and connections; starts the embedded server if asked.

        Raises:
            ValueError: the cache needs a package that is not installed.
            JudgeError: a file cannot be opened, or the embedded server does not start.
        """
        config = self._config
        run = self._aside.run
        self._cache = await run(partial(open_cache, config.cache_path))
        self._log = await run(partial(VerdictLog, config.log_path)) if config.log_path else None
        self._recording = (
            await run(partial(Recording, config.recording)) if config.mode != "live" else None
        )
        if config.mode == "replay":
            return self
        urls = config.endpoints
        if config.kind == "taxonomy" and not urls:
            self._server = LocalJudgeServer(config.taxonomy_path)
            urls = (await asyncio.to_thread(self._server.start),)
        self._pool.open(urls)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops workers, server and connections; closes the files."""
        self._is_closed = True
        for worker in self._workers:
            worker.cancel()
        writing = [self._writer] if self._writer is not None else []
        await asyncio.gather(*self._workers, *writing, return_exceptions=True)
        self._fail_all(JudgeError("judge client closed while pairs were waiting"))
        await self._pool.close()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)
        for file in (self._cache, self._log, self._recording):
            if file is not None:
                await self._aside.run(file.close)
        self._aside.close()

    async def label(self, pairs: Sequence[Pair], step: int = 0) -> list[Outcome]:
        """Labels every pair, in the order given.

        Args:
            pairs: raw text; identical ones (after normalisation) are asked once.
            step: training step, for the verdict log and the recording.

        Returns:
            One `Verdict` or `Failure` per pair.

        Raises:
            JudgeDownError: no endpoint answered within the pause budget.
            ReplayMissError: replay mode, and the recording does not hold a pair.
            JudgeError: cache or log cannot be written.
        """
        started = time.monotonic()
        positions: dict[Pair, int] = {}
        truths = {text: normalize(text) for text in {pair.ground_truth for pair in pairs}}
        normal = [Pair(truths[pair.ground_truth], normalize(pair.answer)) for pair in pairs]
        for index, (truth, answer) in enumerate(normal):
            if truth == answer:
                normal[index] = as_seen(pairs[index], normal[index])
        order = [positions.setdefault(pair, len(positions)) for pair in normal]
        synonyms = self._cascade.synonyms(pairs, normal)
        outcomes = await self._label_distinct(list(positions), step, synonyms)
        self._stats.wait_s += time.monotonic() - started
        results = spread(outcomes, order)
        self._stats.count(results)
        if self._log is not None:
            await self._aside.run(partial(self._log.add, step, normal, results))
        return results

    async def _label_distinct(
        self, pairs: list[Pair], step: int, synonyms: frozenset[Pair]
    ) -> list[Outcome]:
        """Outcomes of distinct normalised pairs, of which the table knows `synonyms`."""
        keys = self._keys.keys(pairs)
        if self._recording is not None and self._config.mode == "replay":
            return [self._recording.replay(k, step, p) for k, p in zip(keys, pairs, strict=True)]
        outcomes: dict[bytes, Outcome] = {**await self._look_up(keys)}
        fresh: list[_Ask] = []
        joined: list[_Ask] = []  # somebody else asks already
        for key, pair in zip(keys, pairs, strict=True):
            if key in outcomes:
                continue
            if (settled := self._settle(key, pair, step, pair in synonyms)) is not None:
                outcomes[key] = settled
            elif (ask := self._in_flight.get(key)) is not None:
                joined.append(ask)
            else:
                fresh.append(self._new_ask(key, pair))
        if fresh and not self._workers:
            self._pool.renew()
        size = self._config.pairs_per_request
        for start in range(0, len(fresh), size):
            self._enqueue(_Job(fresh[start : start + size]))
        if fresh or joined:  # being cancelled leaves the futures running for others
            await asyncio.wait([ask.future for ask in fresh + joined])
        outcomes.update((ask.key, ask.future.result()) for ask in fresh)
        outcomes.update((ask.key, as_cached(ask.future.result())) for ask in joined)
        done = [outcomes[key] for key in keys]
        if self._recording is not None:
            kept = [
                self._recording.keep(key, step, pair, outcome)
                for key, pair, outcome in zip(keys, pairs, done, strict=True)
            ]
            rows = [row for row in kept if row is not None]
            await self._aside.run(partial(self._recording.write, rows))
        return done

    async def _look_up(self, keys: list[bytes]) -> dict[bytes, Verdict]:
        """Cached verdicts, from memory and, aside, from the place that holds them all."""
        found = self._cache.recall(keys)
        missing = [key for key in keys if key not in found]
        if not missing:
            return found
        # One thread, one order: a label stored before is found, one stored later is in flight yet.
        rows = await self._aside.run(partial(self._cache.fetch, missing))
        return {**found, **self._cache.remember(rows)}

    def _settle(self, key: bytes, pair: Pair, step: int, is_synonym: bool) -> Outcome | None:
        """The outcome of a pair that is not in the cache and still needs no request, or None."""
        if not pair.answer or not pair.ground_truth:
            side = "ground truth" if pair.answer else "answer"
            message = f"{side} is empty after normalisation: a format failure"
            return failure(FailureKind.UNPARSABLE, message)
        length, limit = len(pair.answer), self._config.max_answer_chars
        if length > limit:
            message = f"answer has {length} characters, more than judge.max_answer_chars={limit}"
            return failure(FailureKind.TOO_LONG, message)
        if self._config.has_cascade and pair.ground_truth == pair.answer:
            return Verdict(Category.SPECIFIC, "exact", is_cached=True)
        if self._config.has_cascade and is_synonym:
            return Verdict(Category.SPECIFIC, "synonym", is_cached=True)
        return self._recording.find(key, step) if self._recording is not None else None

    def _new_ask(self, key: bytes, pair: Pair) -> _Ask:
        """A question that is in flight from now on."""
        ask = self._in_flight[key] = _Ask(key, pair, asyncio.get_running_loop().create_future())
        # Marks an error as seen, for the caller may have been cancelled.
        ask.future.add_done_callback(asyncio.Future.exception)
        return ask

    def _enqueue(self, job: _Job) -> None:
        """Puts a job into the queue and sees that somebody serves it."""
        if self._is_closed:
            return
        self._queue.append(job)
        if len(self._workers) < self._max_workers:
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._worker_done)

    def _worker_done(self, worker: asyncio.Task[None]) -> None:
        """Hands a worker's error to everybody who waits, so that nobody waits for ever."""
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Ends all pending questions with `error`."""
        self._queue.clear()
        asks, self._in_flight = list(self._in_flight.values()), {}
        for ask in asks:
            if not ask.future.done():
                ask.future.set_exception(error)

    async def _work(self) -> None:
        """Serves the queue until it is empty."""
        while self._queue:
            job = self._queue.popleft()
            if all(ask.future.done() for ask in job.asks):
                continue  # the judge was given up while this one waited for its next try
            pairs = [ask.pair for ask in job.asks]
            tokens = self._estimate(pairs)
            await self._limiter.acquire(tokens)
            endpoint = await self._pool.acquire()
            result = await self._ask(endpoint, pairs)
            if isinstance(result, Reply):
                self._limiter.correct(result.prompt_tokens + result.completion_tokens - tokens)
                self._receive(job, result)
            else:
                self._retry_or_fail(job, result)

    def _estimate(self, pairs: list[Pair]) -> float:
        """Tokens of a request, about: four characters each, and the reply's limit."""
        if not self._config.tokens_per_minute:
            return 0.0
        text = sum(len(pair.ground_truth) + len(pair.answer) + 50 for pair in pairs)
        fixed = len(self._prompt.system) + len(self._prompt.user)
        return (fixed + text) / 4 + self._config.max_reply_tokens * len(pairs)

    async def _ask(self, endpoint: Endpoint, pairs: list[Pair]) -> Reply | AskError:
        """One request to one endpoint, counted and timed."""
        started = time.monotonic()
        error: AskError | None = AskError(FailureKind.SERVER, "cancelled", is_retryable=False)
        try:
            result = await endpoint.ask(pairs)
            error = result if isinstance(result, AskError) else None
        finally:
            self._pool.release(endpoint, error)
        self._stats.request(time.monotonic() - started, result)
        return result

    def _receive(self, job: _Job, reply: Reply) -> None:
        """Takes the labels out of a reply; what is no label is asked again, one pair at a time."""
        labels = read_labels(self._prompt, reply, len(job.asks))
        if labels is not None:
            self._unwritten += zip(job.asks, labels, strict=True)
            if self._writer is None or self._writer.done():
                self._writer = asyncio.create_task(self._write())
                self._writer.add_done_callback(self._worker_done)
            return
        job.unparsable += 1
        if job.unparsable <= self._config.unparsable_retries:
            self._again(job, 0.0)
            return
        self._give_up(job, FailureKind.UNPARSABLE, f"judge {reply.trouble}")

    async def _write(self) -> None:
        """Makes labels durable, all that have come in the meantime at once, then gives them out."""
        judge = self._config.model_name
        while self._unwritten:
            batch, self._unwritten = self._unwritten, []
            now = time.time()
            rows = [
                (ask.key, int(category), judge, *ask.pair, self._keys.scope, now)
                for ask, category in batch
            ]
            await self._aside.run(partial(self._cache.store, rows))
            self._cache.remember((key, category, said_by) for key, category, said_by, *_ in rows)
            for ask, category in batch:
                self._finish(ask, Verdict(category, judge))

    def _retry_or_fail(self, job: _Job, error: AskError) -> None:
        """Decides whether a failed request is tried again."""
        if not error.is_retryable:
            self._give_up(job, error.kind, error.message)
            return
        job.attempts += 1
        has_answered = self._pool.num_successes != job.seen_successes
        job.seen_successes = self._pool.num_successes
        if error.is_of_endpoint:
            is_over = self._is_refused_for_good(job, has_answered)
        else:
            job.strikes += has_answered
            is_over = job.strikes > self._config.max_retries
        if is_over:
            self._give_up(job, error.kind, f"after {job.attempts} tries: {error.message}")
            return
        self._again(job, error.retry_after_s if error.retry_after_s <= RETRY_AFTER_MAX_S else 0.0)

    def _is_refused_for_good(self, job: _Job, has_answered: bool) -> bool:
        """Counts a refusal; True if this job alone is refused, again and again.

        The pool's pause ends with each probe that succeeds, so it cannot bound a job that is
        refused after every one of them.
        """
        now = time.monotonic()
        job.refused_since = job.refused_since or now
        job.refusals += has_answered
        is_spent = now - job.refused_since > self._config.pause_budget_s
        return is_spent and job.refusals > self._config.max_retries

    def _again(self, job: _Job, at_least_s: float) -> None:
        """Queues a job once more after a jittered wait that doubles each time."""
        config = self._config
        ceiling = min(config.backoff_max_s, config.backoff_s * 2 ** min(job.strikes, 20))
        wait = at_least_s + self._jitter.uniform(0.5, 1.0) * ceiling
        self._stats.retries += 1
        asyncio.get_running_loop().call_later(wait, self._enqueue, job)

    def _give_up(self, job: _Job, kind: FailureKind, message: str) -> None:
        """Ends a job without a label; the pairs of a batch get a try of their own first."""
        if len(job.asks) > 1:
            for ask in job.asks:
                self._enqueue(_Job([ask]))
            return
        (ask,) = job.asks
        self._finish(ask, failure(kind, f"{ask.pair.answer!r}: {message}"))

    def _finish(self, ask: _Ask, outcome: Outcome) -> None:
        """Gives a pair's outcome to everybody who waits for it."""
        self._in_flight.pop(ask.key, None)
        if not ask.future.done():
            ask.future.set_result(outcome)

    async def check_health(self, deadline_s: float = 60.0) -> None:
        """Waits until an endpoint labels a probe; does nothing in replay mode.

        Raises:
            JudgeError: none does within `deadline_s`; at once for a refused key or model.
        """
        if self._config.mode != "replay":
            await self._pool.check(deadline_s)

    def stats(self) -> dict[str, float]:
        """Metrics since the client opened, under `judge/`."""
        return {
            **self._stats.metrics(),
            "judge/pause_s": self._pool.pause_s,
            "judge/endpoints_up": float(self._pool.num_up),
            "judge/limited_s": self._limiter.waited_s,
        }
