"""What a judge is: pairs go in, a verdict or a typed failure comes out for each of them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from speciarl_jax.errors import JudgeError
from speciarl_jax.types import Failure, FailureKind, Verdict

Outcome = Verdict | Failure


class Pair(NamedTuple):
    """One question for the judge; raw text, the client normalises it.

    A named tuple, not a dataclass: half the time to make and to hash, which is most of what a
    cached label costs.

    Attributes:
        ground_truth: the label of the image, as the data set spells it.
        answer: what the policy said inside its answer tags; untrusted.
    """

    ground_truth: str
    answer: str


class JudgeDownError(JudgeError):
    """No endpoint gave a label for longer than the pause budget; nothing labelled is lost."""


class ReplayMissError(JudgeError):
    """Replay mode met a pair that the recording does not hold."""


class TokenError(JudgeError):
    """No access token just now (the token server is out); asking again may help."""


class UnknownTruthError(JudgeError):
    """The offline judge was asked about a ground truth that its tree does not contain."""


def failure(kind: FailureKind, message: str) -> Failure:
    """A `Failure` whose message is one line of at most 300 characters."""
    return Failure(kind, " ".join(message.split())[:300])


def as_cached(outcome: Outcome) -> Outcome:
    """The same outcome for somebody who made no request of his own."""
    return dataclasses.replace(outcome, is_cached=True) if isinstance(outcome, Verdict) else outcome


def spread(outcomes: list[Outcome], order: list[int]) -> list[Outcome]:
    """Outcomes by position; the second and later users of one count as cached."""
    if len(outcomes) == len(order):
        return [outcomes[index] for index in order]
    later = [as_cached(outcome) for outcome in outcomes]
    seen: set[int] = set()
    results = []
    for index in order:
        results.append(later[index] if index in seen else outcomes[index])
        seen.add(index)
    return results
