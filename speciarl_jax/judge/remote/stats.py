"""Counters of the judge's client and the metrics made of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from speciarl_jax.judge.base import Outcome
from speciarl_jax.judge.remote.reply import AskError, Reply
from speciarl_jax.types import FailureKind, Verdict


@dataclasses.dataclass
class ClientStats:
    """Running totals.

    Attributes:
        requests: HTTP requests made, `retries` among them.
        labels: pairs asked for, duplicates included; `cached` needed no request.
        wait_s: spent by callers waiting for labels, summed over calls.
        request_s: spent on the requests that brought a reply, of which there were `replies`.
        prompt_tokens, completion_tokens: as the endpoints report them.
        failed: pairs without a label.
        errors: failed requests (most are repeated and succeed).
    """

    requests: int = 0
    retries: int = 0
    labels: int = 0
    cached: int = 0
    wait_s: float = 0.0
    request_s: float = 0.0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: Counter[FailureKind] = dataclasses.field(default_factory=Counter)
    errors: Counter[FailureKind] = dataclasses.field(default_factory=Counter)

    def request(self, seconds: float, result: Reply | AskError) -> None:
        """Counts one request."""
        self.requests += 1
        if isinstance(result, AskError):
            self.errors[result.kind] += 1
            return
        self.replies += 1
        self.request_s += seconds
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens

    def count(self, outcomes: Sequence[Outcome]) -> None:
        """Counts the outcomes of one call."""
        self.labels += len(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Verdict):
                self.cached += outcome.is_cached
            else:
                self.failed[outcome.kind] += 1

    def metrics(self) -> dict[str, float]:
        """Totals and shares under `judge/`."""
        labels = max(1, self.labels)
        metrics = {
            "judge/requests": float(self.requests),
            "judge/retries": float(self.retries),
            "judge/labels": float(self.labels),
            "judge/failed": float(self.failed.total()),
            "judge/failed_frac": self.failed.total() / labels,
            "judge/cache_hit_frac": self.cached / labels,
            "judge/wait_s": self.wait_s,
            "judge/latency_s": self.request_s / max(1, self.replies),
            "judge/prompt_tokens": float(self.prompt_tokens),
            "judge/completion_tokens": float(self.completion_tokens),
        }
        for kind in FailureKind:
            metrics[f"judge/failed_{kind.value}"] = float(self.failed[kind])
            metrics[f"judge/error_{kind.value}"] = float(self.errors[kind])
        return metrics
