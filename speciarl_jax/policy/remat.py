"""Rematerialisation of a scanned layer: what the backward pass keeps and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def checkpointed(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wraps a scan body.

    Args:
        body: the scan's function.
        remat: ``none`` keeps every intermediate; ``dots`` keeps the outputs of matmuls with
            weights; ``full`` keeps only the layer's input.

    Raises:
        ValueError: another name.
    """
    if remat == "none":
        return body
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(body, policy=policy, prevent_cse=False)
    if remat == "full":
        return jax.checkpoint(body, prevent_cse=False)
    raise ValueError(f"model.remat={remat!r}: expected one of none, dots, full")
