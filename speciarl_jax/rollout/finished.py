"""Finished answers: what a row has sampled, how it ended, where a stop string cuts it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from speciarl_jax.errors import TrainingStopped


@dataclasses.dataclass(frozen=True)
class FinishedRow:
    """One sampled answer: prompt and sample index, tokens and log-probs [C], how it ended."""

    prompt: int
    sample: int
    completion_tokens: np.ndarray
    logprobs: np.ndarray
    is_truncated: bool


def not_finite(rows: Sequence[FinishedRow]) -> TrainingStopped | None:
    """What to raise if an answer's log-probs are not finite: its tokens were drawn from nothing.

    Names the first such token; None where all is well.
    """
    for row in rows:
        bad = np.flatnonzero(~np.isfinite(row.logprobs))
        if len(bad):
            return TrainingStopped(
                f"prompt {row.prompt} of the batch, sample {row.sample}: the policy's logits are "
                f"not finite numbers at token {bad[0]}, so its weights or activations are not; go "
                "back to an earlier checkpoint with a lower optim.learning_rate, or, before any "
                "training, load the model again with model.compute_dtype=float32"
            )
    return None


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
