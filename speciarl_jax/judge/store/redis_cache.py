"""Verdicts on a Redis server, so that hosts and runs share what any of them has asked.

A label is one key: a fixed prefix and the 16 bytes of `KeyMaker`; its value is a JSON list of the
rest of the row, category and judge first. Labels are written with NX, so the first one stays
whoever writes it. Other keys on the server are never touched.

The password is read from the environment (REDIS_PASSWORD): a recipe is saved with its run, so a
URL that holds one is refused.
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from speciarl_jax.config.judge import check_url
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.store.base import Row, VerdictCache
from speciarl_jax.types import Category, JsonObject

T = TypeVar("T")
_PREFIX = b"speciarl:verdict:"
_CHUNK = 5_000  # keys in one round trip
_SOCKET_TIMEOUT_S = 2.0  # to connect, and again to read
_PATIENCE_S = 5.0  # with a server that restarts, from its first failure; 9 s with both time-outs
_WAITS_S = (0.1, 0.2, 0.4, 0.8)  # between tries, the last one again and again


class RedisCache(VerdictCache):
    """A map on a Redis server; one MGET per batch of pairs, one SET per new verdict."""

    def __init__(self, url: str) -> None:
        """Connects to redis://HOST:PORT/DB, or rediss:// for TLS; the URL has no password.

        Raises:
            ValueError: the package redis is not installed, or the URL is not of that form.
            JudgeError: the server does not answer or refuses the password.
        """
        super().__init__(url)
        check_url(url)
        try:
            redis = importlib.import_module("redis")
        except ImportError as error:
            raise ValueError(
                f"judge.cache_path={url} needs the package redis ({error}): "
                "pip install 'speciarl-jax[redis]'"
            ) from error
        self._error = redis.RedisError
        self._outage = (redis.ConnectionError, redis.TimeoutError)
        self._out_since: float | None = None
        self.patience_s = 0.0  # at once at the start: a wrong address does not mend itself
        self._redis = redis.Redis.from_url(
            url,
            password=os.environ.get("REDIS_PASSWORD") or None,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        )
        self._ask(self._redis.ping)
        self.patience_s = _PATIENCE_S

    def _ask(self, command: Callable[[], T]) -> T:
        """What `command` gives; tried again while the server is out, as long as patience lasts.

        Patience counts from the first failure since the last answer, not from each command, so
        that a server that is gone for good ends everything at once.

        Raises:
            JudgeError: what the client library raised (server gone, full, read-only), one line.
        """
        for wait in itertools.chain(_WAITS_S, itertools.repeat(_WAITS_S[-1])):
            try:
                result = command()
            except self._error as error:
                now = time.monotonic()
                self._out_since = self._out_since or now
                left = self._out_since + self.patience_s - now
                if isinstance(error, self._outage) and wait < left:
                    time.sleep(wait)
                    continue
                raise JudgeError(
                    f"judge cache {self.place}: {error}; see that the server runs and takes "
                    "writes, or set judge.cache_path to a file"
                ) from error
            self._out_since = None
            return result
        raise AssertionError("unreachable: the last wait comes again and again")

    def _fetch(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, str]]:
        for chunk in _chunks(keys):
            names = [_PREFIX + key for key in chunk]
            values = self._ask(functools.partial(self._redis.mget, names))
            for key, value in zip(chunk, values, strict=True):
                if value is not None:
                    category, judge, *_ = json.loads(value)
                    yield key, category, judge

    def _insert(self, rows: Sequence[Row]) -> int:
        if not rows:
            return 0
        return self._ask(functools.partial(self._set_new, rows))

    def _set_new(self, rows: Sequence[Row]) -> int:
        """One transaction; counts the keys that were new."""
        with self._redis.pipeline(transaction=True) as pipeline:
            for key, *rest in rows:
                pipeline.set(_PREFIX + key, json.dumps(rest), nx=True)
            return sum(reply is True for reply in pipeline.execute())

    def _names(self) -> set[bytes]:
        """Our names; one SCAN over the server."""
        return self._ask(lambda: set(self._redis.scan_iter(match=_PREFIX + b"*", count=_CHUNK)))

    def _values(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of ours, in no order."""
        for chunk in _chunks(self._names()):
            values = self._ask(functools.partial(self._redis.mget, chunk))
            for name, value in zip(chunk, values, strict=True):
                if value is not None:  # deleted in between
                    yield name.removeprefix(_PREFIX), value

    def _rows(self) -> Iterator[Row]:
        for key, value in self._values():
            category, judge, truth, answer, scope, created = json.loads(value)
            yield key, category, judge, truth, answer, scope, created

    def _scan(self) -> Iterator[Row]:
        yield from sorted(self._rows(), key=lambda row: (row[3], row[4], row[0]))

    def __len__(self) -> int:
        return len(self._names())

    def stats(self) -> JsonObject:
        """Number of labels in all, by category, by judge and by scope; bytes of keys and values."""
        counts: dict[str, collections.Counter[str]] = {
            name: collections.Counter() for name in ("by_category", "by_judge", "by_scope")
        }
        labels = size = 0
        for key, value in self._values():
            category, judge, _, _, scope, _ = json.loads(value)
            labels, size = labels + 1, size + len(_PREFIX) + len(key) + len(value)
            counts["by_category"][Category(category).label] += 1
            counts["by_judge"][judge] += 1
            counts["by_scope"][scope] += 1
        by_name = {name: dict(sorted(count.items())) for name, count in counts.items()}
        return {"labels": labels, "bytes": size, **by_name}

    def purge(self, judge: str = "", older_than_s: float = 0.0) -> int:
        """Deletes labels of a judge (all judges if empty) older than an age; returns how many."""
        before = time.time() - older_than_s
        doomed = [
            _PREFIX + row[0] for row in self._rows() if judge in ("", row[2]) and row[6] <= before
        ]
        self._memory.clear()
        count = 0
        for chunk in _chunks(doomed):
            count += self._ask(functools.partial(self._redis.unlink, *chunk))
        return count

    def close(self) -> None:
        """Ends the connection."""
        self._redis.close()


def _chunks(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lists of at most `_CHUNK` items."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk
