"""Finished answers: what a row has sampled, how it ended, where a stop string cuts it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """One sampled answer: prompt and sample index, tokens and log-probs [C], how it ended."""

    prompt: int
    sample: int
    completion_tokens: np.ndarray
    logprobs: np.ndarray
    is_truncated: bool


def stop_string_length(
    tokens: np.ndarray, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int | None:
    """Number of tokens up to the one that completes a stop string, None if there is none."""

    def is_stopped(count: int) -> bool:
        text = decode(tokens[:count].tolist())
        return any(stop in text for stop in stops)

    if not stops or not is_stopped(len(tokens)):
        return None
    # Text grows with the tokens, so bisection finds the first one.
    return bisect.bisect_left(range(len(tokens)), True, lo=1, key=is_stopped)
