"""Verdicts that last: a SQLite file in WAL mode, or a Redis server that several hosts share.

Each verdict is written as it arrives. The key is a hash of everything that could change a label:
model, revision, prompt wording, sampling parameters and the two normalised texts. Only labels are
kept, never failures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from speciarl_jax.config.judge import REDIS_SCHEMES
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.store.base import VerdictCache
from speciarl_jax.judge.store.sqlite_cache import SqliteCache


class KeyMaker:
    """Cache keys of one judge: everything but the pair is hashed once."""

    def __init__(self, **settings: str | float) -> None:
        """Fixes the settings that belong to the key (model, revision, prompt, sampling)."""
        self.scope = json.dumps(settings, sort_keys=True)
        self._prefix = hashlib.sha256(self.scope.encode() + b"\0")

    def keys(self, pairs: Sequence[Pair]) -> list[bytes]:
        """16 bytes for each normalised pair (which holds no NUL)."""
        found = []
        for truth, answer in pairs:
            digest = self._prefix.copy()
            digest.update(f"{truth}\0{answer}".encode("utf-8", "surrogatepass"))
            found.append(digest.digest()[:16])
        return found


def open_cache(place: str) -> VerdictCache:
    """The cache at a place: `redis://HOST:PORT/DB` (`rediss://` over TLS), else a SQLite file.

    Raises:
        ValueError: a Redis URL, and the package redis is not installed.
        JudgeError: the file cannot be opened, or the server does not answer.
    """
    if not place.startswith(REDIS_SCHEMES):
        return SqliteCache(place)
    from speciarl_jax.judge.store.redis_cache import RedisCache

    return RedisCache(place)
