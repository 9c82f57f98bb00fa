"""Majority vote: several judges or several prompts, one label."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Sequence

from speciarl_jax.config.judge import JudgeConfig, apply_overrides
from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import Outcome, Pair, failure
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.types import Category, Failure, Verdict


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """The label most voters gave.

    A tie goes to the lower rung, the claim that needs less proof. Failed votes are left out; if
    half of the voters or more failed, there is no label.

    Args:
        outcomes: one per voter, at least one.

    Returns:
        A verdict of judge `vote`, cached if every vote was; or the first failure.

    Source: own.
    """
    verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if 2 * len(failures) >= len(outcomes):
        count = f"{len(failures)} of {len(outcomes)}"
        return failure(failures[0].kind, f"{count} voters failed: {failures[0].message}")
    votes = collections.Counter(verdict.category for verdict in verdicts)
    most = max(votes.values())
    category = min(rung for rung, count in votes.items() if count == most)
    return Verdict(Category(category), "vote", all(verdict.is_cached for verdict in verdicts))


class VoteJudge:
    """Asks every voter about every pair; an asynchronous context manager like `JudgeClient`."""

    def __init__(self, config: JudgeConfig) -> None:
        """Makes one client per voter; each is the whole configuration with its own overrides.

        Cache and recording are shared files (their keys tell the voters apart); only the first
        voter writes the verdict log.

        Raises:
            ValueError: a setting is impossible, or a voter names no setting.
        """
        configs = [
            apply_overrides(config, [*voter.split(","), "voters="]) for voter in config.voters
        ]
        for voter in configs[1:]:
            voter.log_path = ""
        self.clients = [JudgeClient(voter) for voter in configs]

    async def __aenter__(self) -> VoteJudge:
        """Opens every voter.

        Raises:
            JudgeError: one of them cannot be opened.
        """
        async with contextlib.AsyncExitStack() as stack:
            for client in self.clients:
                await stack.enter_async_context(client)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes every voter."""
        await self._stack.aclose()

    async def label(self, pairs: Sequence[Pair], step: int = 0) -> list[Outcome]:
        """One majority label per pair, in the order given.

        Raises:
            JudgeError: as `JudgeClient.label`.
        """
        votes = await asyncio.gather(*(client.label(pairs, step) for client in self.clients))
        return [majority(outcomes) for outcomes in zip(*votes, strict=True)]

    async def check_health(self, deadline_s: float = 60.0) -> None:
        """Waits until every voter answers.

        Raises:
            JudgeError: one does not.
        """
        await asyncio.gather(*(client.check_health(deadline_s) for client in self.clients))

    def stats(self) -> dict[str, float]:
        """Sums over the voters; shares and latencies are means."""
        means = ("_frac", "latency_s")
        table = [client.stats() for client in self.clients]
        return {
            name: sum(stats[name] for stats in table) / (len(table) if name.endswith(means) else 1)
            for name in table[0]
        }


def make_judge(config: JudgeConfig) -> JudgeClient | VoteJudge:
    """The judge that a configuration describes, not opened yet.

    Raises:
        ValueError: a setting is impossible.
        JudgeError: a vote of fewer than two.
    """
    config.validate()
    if not config.voters:
        return JudgeClient(config)
    if len(config.voters) < 2:
        raise JudgeError(f"judge.voters={config.voters}: a vote needs two voters or more")
    return VoteJudge(config)
