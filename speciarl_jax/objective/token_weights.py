"""Aggregation as data: one weight per token, so that every loss is ``sum(weights * loss)``.

The weights of a whole mini-batch are built here once, on the host. Micro-batches and devices then
take their rows and add up; whatever the split, the sum is the same, because the one division has
been done already. verl's own means per micro-batch are just other weights.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from speciarl_jax.config.schema import AGGREGATIONS


def token_weights(
    completion_lengths: Int[np.ndarray, " B"],
    sequence_valid: Bool[np.ndarray, " B"],
    max_completion_tokens: int,
    aggregation: str,
    normalization: str = "global",
    verl_micro_batch: int = 0,
    verl_ranks: int = 1,
    loss_norm_tokens: int = 0,
) -> Float32[np.ndarray, "B C"]:
    """Weights w [B, C] with loss = sum(w * l), for any per-token loss l.

    With V the valid sequences, n_i their lengths and L = `loss_norm_tokens`:

    ===========================  ==========================================
    ``token-mean``               w = 1 / sum_{j in V} n_j
    ``seq-mean-token-sum``       w = 1 / |V|
    ``seq-mean-token-mean``      w = 1 / (|V| n_i)
    ``seq-mean-token-sum-norm``  w = 1 / (|V| L)               (Dr.GRPO)
    ===========================  ==========================================

    ``normalization="verl"`` applies the formula within each of verl's micro-batches instead, and
    averages those; there Dr.GRPO divides by L alone, not by the number of sequences. Rows are
    verl's order: `verl_ranks` equal blocks, each cut into micro-batches. A shorter last one counts
    by its share of the sequences, as verl weights dynamic micro-batches; one in which nothing is
    valid leaves the average.

    Args:
        completion_lengths: trained tokens of each row, 0..`max_completion_tokens`, stop included.
        sequence_valid: False for rows that teach nothing (unlabelled, dropped, padding): they
            leave numerator and denominator. A row of length 0 counts as not valid.
        max_completion_tokens: C, the padded width of the arrays.
        aggregation: one of `AGGREGATIONS`.
        normalization: ``global`` or ``verl``.
        verl_micro_batch: sequences in a micro-batch of one rank; ``verl`` only.
        verl_ranks: data-parallel ranks; ``verl`` only; must divide B.
        loss_norm_tokens: L, the configured maximum completion length, which a padded width C may
            fall short of; 0 takes C. ``seq-mean-token-sum-norm`` only.

    Returns:
        float32 weights, exactly 0 past a row's length and in rows that are not valid; all 0 if no
        row is valid.

    Raises:
        ValueError: unknown names, lengths that do not fit C, or a split verl could not make.

    Source: verl, core_algos.agg_loss and dp_actor.update_policy; global division is our own.
    """
    width = max_completion_tokens
    _check(completion_lengths, width, aggregation, normalization)
    lengths = np.where(sequence_valid, completion_lengths, 0).astype(np.int64)
    norm_tokens = loss_norm_tokens or width
    rows = np.zeros(len(lengths))
    if normalization == "global":
        rows = _row_weights(lengths, aggregation, norm_tokens, divide_norm_by_rows=True)
    else:
        blocks = _verl_blocks(lengths, verl_micro_batch, verl_ranks)
        total = sum(block.stop - block.start for block in blocks)
        for block in blocks:
            mean = _row_weights(lengths[block], aggregation, norm_tokens, divide_norm_by_rows=False)
            rows[block] = mean * ((block.stop - block.start) / total)
    is_token = np.arange(width) < lengths[:, None]  # [B, C]
    return np.where(is_token, rows[:, None], 0.0).astype(np.float32)


def _row_weights(
    lengths: Int[np.ndarray, " B"], aggregation: str, norm_tokens: int, *, divide_norm_by_rows: bool
) -> Float[np.ndarray, " B"]:
    """The weight that every token of a row shares; rows of length 0 get 0."""
    is_row = lengths > 0
    num_rows = int(is_row.sum())
    divisor = {
        "token-mean": lengths.sum(),
        "seq-mean-token-sum": num_rows,
        "seq-mean-token-mean": num_rows * lengths,
        "seq-mean-token-sum-norm": norm_tokens * (num_rows if divide_norm_by_rows else 1),
    }[aggregation]
    rows = np.zeros(len(lengths))
    np.divide(1.0, divisor, out=rows, where=is_row)
    return rows


def _verl_blocks(lengths: Int[np.ndarray, " B"], micro_batch: int, ranks: int) -> list[slice]:
    """Rows of each micro-batch that holds something valid."""
    if micro_batch < 1 or ranks < 1 or len(lengths) % ranks:
        raise ValueError(
            f"verl_micro_batch={micro_batch}, verl_ranks={ranks}: expected both >= 1 and ranks "
            f"dividing the mini-batch of {len(lengths)} sequences"
        )
    per_rank = len(lengths) // ranks
    blocks = [
        slice(start, min(start + micro_batch, (rank + 1) * per_rank))
        for rank in range(ranks)
        for start in range(rank * per_rank, (rank + 1) * per_rank, micro_batch)
    ]
    return [block for block in blocks if lengths[block].any()]


def _check(
    lengths: Int[np.ndarray, " B"], width: int, aggregation: str, normalization: str
) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r}: expected one of {', '.join(AGGREGATIONS)}")
    if normalization not in ("global", "verl"):
        raise ValueError(f"normalization {normalization!r}: expected global or verl")
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= width:
        raise ValueError(
            f"completion lengths {lengths.min()}..{lengths.max()}: expected 0..{width}, the "
            "padded width"
        )
