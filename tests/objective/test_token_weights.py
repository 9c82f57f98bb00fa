"""Aggregation weights: by hand, against verl's loop over micro-batches, and their invariances."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from speciarl_jax.config.schema import AGGREGATIONS
from speciarl_jax.objective.token_weights import token_weights

WIDTH = 6


def reference_loss(
    losses: np.ndarray, lengths: list[int], valid: list[bool], aggregation: str, norm: float
) -> float | None:
    """One aggregate over rows given as lists of tokens; None if no row is valid."""
    rows = [
        [float(losses[i, t]) for t in range(n)] for i, n in enumerate(lengths) if valid[i] and n > 0
    ]
    if not rows:
        return None
    if aggregation == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    if aggregation == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / norm


def reference_global(losses, lengths, valid, aggregation, norm_tokens):  # type: ignore[no-untyped-def]
    count = sum(1 for n, v in zip(lengths, valid, strict=True) if v and n > 0)
    return reference_loss(losses, lengths, valid, aggregation, norm_tokens * count) or 0.0


def reference_verl(losses, lengths, valid, aggregation, norm_tokens, micro, ranks):  # type: ignore[no-untyped-def]
    """Rank by rank, micro-batch by micro-batch, as verl accumulates; empty ones are not there."""
    per_rank = len(lengths) // ranks
    terms, sizes = [], []
    for rank in range(ranks):
        mine = list(range(rank * per_rank, (rank + 1) * per_rank))
        while mine:
            rows, mine = mine[:micro], mine[micro:]
            mean = reference_loss(
                losses[rows],
                [lengths[i] for i in rows],
                [valid[i] for i in rows],
                aggregation,
                norm_tokens,
            )
            if mean is not None:
                terms.append(mean * len(rows))
                sizes.append(len(rows))
    return sum(terms) / sum(sizes) if sizes else 0.0


def dot(weights: np.ndarray, losses: np.ndarray) -> float:
    return float(np.sum(weights.astype(np.float64) * losses))


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[bool]]:
    size = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(0, WIDTH), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    losses = np.random.default_rng(draw(st.integers(0, 10**6))).normal(size=(size, WIDTH))
    return losses, lengths, valid


# --- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "row_weights"),
    [
        ("token-mean", [1 / 5, 0, 1 / 5, 1 / 5]),
        ("seq-mean-token-sum", [1 / 3, 0, 1 / 3, 1 / 3]),
        ("seq-mean-token-mean", [1 / 3, 0, 1 / 9, 1 / 3]),
        ("seq-mean-token-sum-norm", [1 / 30, 0, 1 / 30, 1 / 30]),  # 3 sequences of at most 10
    ],
)
def test_global_by_hand(aggregation: str, row_weights: list[float]) -> None:
    got = token_weights(
        np.array([1, 4, 3, 1]), np.array([True, False, True, True]), 4, aggregation,
        loss_norm_tokens=10,
    )  # fmt: skip
    is_token = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, is_token * np.array(row_weights)[:, None], rtol=1e-7)


@pytest.mark.parametrize(
    ("aggregation", "row_weights"),
    [
        ("token-mean", [1 / 8, 1 / 8, 1 / 4, 1 / 4]),
        ("seq-mean-token-sum", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("seq-mean-token-mean", [1 / 4, 1 / 12, 1 / 4, 1 / 4]),
        ("seq-mean-token-sum-norm", [1 / 20, 1 / 20, 1 / 20, 1 / 20]),  # not by sequences
    ],
)
def test_verl_by_hand(aggregation: str, row_weights: list[float]) -> None:
    lengths = np.array([1, 3, 1, 1])  # two micro-batches of two, of 4 and 2 tokens
    got = token_weights(lengths, np.ones(4, bool), 4, aggregation, "verl", 2, 1, 10)
    is_token = np.arange(4) < lengths[:, None]
    np.testing.assert_allclose(got, is_token * np.array(row_weights)[:, None], rtol=1e-7)


def test_norm_tokens_default_to_the_width() -> None:
    lengths, valid = np.array([2, 5]), np.ones(2, bool)
    got = token_weights(lengths, valid, 8, "seq-mean-token-sum-norm")
    np.testing.assert_allclose(got[1, :6], [1 / 16] * 5 + [0], rtol=1e-7)
    other = token_weights(lengths, valid, 8, "token-mean", loss_norm_tokens=100)
    np.testing.assert_array_equal(other, token_weights(lengths, valid, 8, "token-mean"))


# --- against the loops --------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(batch=batches())
def test_global_matches_reference(
    aggregation: str, batch: tuple[np.ndarray, list[int], list[bool]]
) -> None:
    losses, lengths, valid = batch
    weights = token_weights(
        np.array(lengths), np.array(valid), WIDTH, aggregation, loss_norm_tokens=9
    )
    expected = reference_global(losses, lengths, valid, aggregation, 9)
    assert dot(weights, losses) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(batch=batches(), micro=st.integers(1, 13), ranks=st.integers(1, 4))
def test_verl_matches_reference(
    aggregation: str, batch: tuple[np.ndarray, list[int], list[bool]], micro: int, ranks: int
) -> None:
    losses, lengths, valid = batch
    hypothesis.assume(len(lengths) % ranks == 0)
    weights = token_weights(
        np.array(lengths), np.array(valid), WIDTH, aggregation, "verl", micro, ranks, 9
    )
    expected = reference_verl(losses, lengths, valid, aggregation, 9, micro, ranks)
    assert dot(weights, losses) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "seq-mean-token-sum-norm"])
def test_verl_with_one_micro_batch_is_global(aggregation: str) -> None:
    lengths, valid = np.array([3, 1, 6, 2]), np.array([True, True, False, True])
    np.testing.assert_array_equal(
        token_weights(lengths, valid, WIDTH, aggregation, "verl", 4),
        token_weights(lengths, valid, WIDTH, aggregation),
    )


def test_verl_means_depend_on_the_split() -> None:
    lengths, valid = np.array([6, 1, 1, 1]), np.ones(4, bool)
    by_1, by_2 = (token_weights(lengths, valid, 6, "token-mean", "verl", m) for m in (1, 2))
    np.testing.assert_allclose(by_1[:, 0], [1 / 24, 1 / 4, 1 / 4, 1 / 4], rtol=1e-7)
    np.testing.assert_allclose(by_2[:, 0], [1 / 14, 1 / 14, 1 / 4, 1 / 4], rtol=1e-7)


# --- invariances of the global normalisation ----------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(batch=batches(), seed=st.integers(0, 999), num_parts=st.integers(1, 8))
def test_any_split_sums_to_the_whole(
    aggregation: str,
    batch: tuple[np.ndarray, list[int], list[bool]],
    seed: int,
    num_parts: int,
) -> None:
    """Shuffle rows, pad them to a micro-batch grid and a wider array: the same loss comes out."""
    losses, lengths, valid = batch
    expected = reference_global(losses, lengths, valid, aggregation, 9)
    rng = np.random.default_rng(seed)
    padded = -(-len(lengths) // num_parts) * num_parts
    slots = rng.permutation(padded)[: len(lengths)]
    wide = rng.normal(size=(padded, WIDTH + 3)) * 100  # whatever padding holds
    wide[slots, :WIDTH] = losses
    all_lengths, all_valid = np.full(padded, WIDTH + 3), np.zeros(padded, bool)
    all_lengths[slots], all_valid[slots] = lengths, valid
    weights = token_weights(all_lengths, all_valid, WIDTH + 3, aggregation, loss_norm_tokens=9)
    parts = [
        dot(w, part)
        for w, part in zip(np.split(weights, num_parts), np.split(wide, num_parts), strict=True)
    ]
    assert sum(parts) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalization", ["global", "verl"])
def test_masked_rows_leave_numerator_and_denominator(aggregation: str, normalization: str) -> None:
    lengths = np.array([3, 5, 2, 4, 1, 6, 6, 6, 6])
    valid = np.array([True, False, True, True, False, True, False, False, False])
    whole = token_weights(lengths, valid, WIDTH, aggregation, normalization, 3)
    changed = np.where(valid, lengths, 1)
    np.testing.assert_array_equal(
        token_weights(changed, valid, WIDTH, aggregation, normalization, 3), whole
    )
    np.testing.assert_array_equal(whole[~valid], 0)
    assert np.all((whole > 0) == (np.arange(WIDTH) < np.where(valid, lengths, 0)[:, None]))
    # the last micro-batch holds nothing valid: as if it were not there
    np.testing.assert_array_equal(
        token_weights(lengths[:6], valid[:6], WIDTH, aggregation, normalization, 3), whole[:6]
    )
    if normalization == "global":
        alone = token_weights(lengths[valid], valid[valid], WIDTH, aggregation)
        np.testing.assert_array_equal(alone, whole[valid])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalization", ["global", "verl"])
def test_nothing_valid_gives_zeros(aggregation: str, normalization: str) -> None:
    got = token_weights(
        np.array([3, 0, 2, 1]), np.zeros(4, bool), WIDTH, aggregation, normalization, 2
    )
    np.testing.assert_array_equal(got, np.zeros((4, WIDTH), np.float32))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aggregation": "mean"}, "aggregation 'mean': expected one of token-mean"),
        ({"normalization": "local"}, "normalization 'local'"),
        ({"max_completion_tokens": 4}, r"lengths 2\.\.5: expected 0\.\.4"),
        ({"completion_lengths": np.array([-1, 2, 3])}, r"lengths -1\.\.3"),
        ({"normalization": "verl"}, "verl_micro_batch=0"),
        ({"normalization": "verl", "verl_micro_batch": 1, "verl_ranks": 2}, "3 sequences"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "completion_lengths": np.array([2, 5, 3]),
        "sequence_valid": np.ones(3, bool),
        "max_completion_tokens": 5,
        "aggregation": "token-mean",
    }
    with pytest.raises(ValueError, match=message):
        token_weights(**(arguments | change))  # type: ignore[arg-type]
