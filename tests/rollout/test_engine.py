"""The decoder against the plain forward; independence of batch split, chunks and compaction."""

import dataclasses

import jax
import numpy as np
import pytest

from speciarl_jax.errors import TrainingStopped
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.sampling import Sampling
from tests.support.tiny_policy import full_logits, jolt, open_small_session, small_batch, states


@pytest.fixture(scope="module")
def session():
    return jolt(open_small_session(), scale=0.15)


def generate(session, batch, group_size=3, sampling=None, step=5, **changes):
    config = session.config.rollout
    settings = {**vars(config), **changes}
    engine = RolloutEngine(session.parts.graphdef, type(config)(**settings), session.vocabulary)
    rows = {}
    for finished in engine.generate(
        states(session),
        batch,
        session.encode(states(session), batch),
        group_size=group_size,
        sampling=sampling or Sampling(),
        seed=1,
        step=step,
    ):
        for row in finished:
            assert (row.prompt, row.sample) not in rows
            rows[row.prompt, row.sample] = row
    return rows, engine


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, row in a.items():
        np.testing.assert_array_equal(row.completion_tokens, b[key].completion_tokens)
        np.testing.assert_allclose(row.logprobs, b[key].logprobs, atol=2e-5)
        assert row.is_truncated == b[key].is_truncated


def test_logprobs_equal_the_plain_forward(session):
    batch = small_batch(session, 3)
    rows, _ = generate(session, batch)
    assert len(rows) == 9
    for (prompt, _), row in rows.items():
        logits = full_logits(session, batch, prompt, row.completion_tokens)
        logits[:, session.vocabulary.banned] = -np.inf
        start = int(batch.prompt_lengths[prompt]) - 1
        logprobs = jax.nn.log_softmax(logits[start : start + len(row.completion_tokens)], axis=-1)
        expected = np.asarray(logprobs)[
            np.arange(len(row.completion_tokens)), row.completion_tokens
        ]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)
        assert not session.vocabulary.banned[row.completion_tokens].any()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_policy_that_is_not_finite_is_refused(session, temperature):
    """One NaN in the adapter; without the check every token is 0 and the answers look like text."""
    leaves, treedef = jax.tree.flatten(session.parts.trainable)
    broken = jax.tree.unflatten(treedef, [leaves[0] * np.nan, *leaves[1:]])
    parts = dataclasses.replace(session.parts, trainable=broken)
    sick = dataclasses.replace(session, parts=parts)
    with pytest.raises(TrainingStopped, match=r"sample \d: the policy's logits are not finite"):
        generate(sick, small_batch(session, 2), sampling=Sampling(temperature=temperature))


def test_greedy_equals_argmax_of_the_plain_forward(session):
    batch = small_batch(session, 2)
    rows, _ = generate(session, batch, group_size=1, sampling=Sampling(temperature=0))
    for (prompt, _), row in rows.items():
        logits = full_logits(session, batch, prompt, row.completion_tokens)
        logits[:, session.vocabulary.banned] = -np.inf
        start = int(batch.prompt_lengths[prompt]) - 1
        best = logits[start : start + len(row.completion_tokens)].argmax(axis=-1)
        np.testing.assert_array_equal(row.completion_tokens, best)


def test_rollouts_do_not_depend_on_their_neighbours(session):
    whole, _ = generate(session, small_batch(session, 4), group_size=4)
    padded, _ = generate(session, small_batch(session, 3, rows=4), group_size=4)
    fewer, _ = generate(session, small_batch(session, 4), group_size=2)
    assert_same({k: v for k, v in whole.items() if k[0] < 3}, padded)
    assert_same({k: v for k, v in whole.items() if k[1] < 2}, fewer)


# Every size that compaction visits is a program to compile: the default suite takes few.
@pytest.mark.parametrize(
    ("prompts", "group_size", "chunk_tokens", "stop_every"),
    [(2, 2, 16, 4), pytest.param(4, 8, 2, 3, marks=pytest.mark.slow)],
)
def test_chunks_and_compaction_change_nothing_but_the_work(
    session, prompts, group_size, chunk_tokens, stop_every
):
    batch = small_batch(session, prompts)
    # Stop on a share of the tokens with which random weights give lengths that differ.
    stops = np.flatnonzero(~session.vocabulary.banned)[::stop_every].astype(np.int32)
    vocabulary = type(session.vocabulary)(
        stops, session.vocabulary.banned, session.vocabulary.decode
    )
    stopping = type(session)(**{**vars(session), "vocabulary": vocabulary})
    plain, first = generate(stopping, batch, group_size=group_size, chunk_tokens=16)
    compact, second = generate(
        stopping, batch, group_size=group_size, chunk_tokens=chunk_tokens, compact=True
    )
    late, third = generate(
        stopping, batch, group_size=group_size, chunk_tokens=16, early_exit=False
    )
    assert_same(plain, compact)
    assert_same(plain, late)
    assert (
        third.stats.decode_steps == 16 > max(len(row.completion_tokens) for row in plain.values())
    )
    lengths = [len(row.completion_tokens) for row in plain.values()]
    assert min(lengths) < max(lengths)
    assert second.stats.slot_utilization > first.stats.slot_utilization
    assert second.stats.live_steps == first.stats.live_steps == sum(lengths)


def test_another_step_samples_other_tokens(session):
    batch = small_batch(session, 2)
    one, _ = generate(session, batch, step=1)
    two, _ = generate(session, batch, step=2)
    assert any(
        not np.array_equal(row.completion_tokens, two[key].completion_tokens)
        for key, row in one.items()
    )


def test_stop_string_cuts_at_the_token_that_completes_it(session):
    batch = small_batch(session, 2)
    rows, _ = generate(session, batch)
    text = session.vocabulary.decode(rows[0, 0].completion_tokens.tolist())
    stop = text[4:7]
    cut, _ = generate(session, batch, stop_strings=(stop,))
    short = session.vocabulary.decode(cut[0, 0].completion_tokens.tolist())
    assert stop in short
    assert stop not in session.vocabulary.decode(cut[0, 0].completion_tokens[:-1].tolist())
    assert not cut[0, 0].is_truncated
    np.testing.assert_array_equal(
        cut[0, 0].completion_tokens,
        rows[0, 0].completion_tokens[: len(cut[0, 0].completion_tokens)],
    )


def test_first_token_may_be_the_stop(session):
    everything = np.flatnonzero(~session.vocabulary.banned).astype(np.int32)
    vocabulary = type(session.vocabulary)(
        everything, session.vocabulary.banned, session.vocabulary.decode
    )
    stopping = type(session)(**{**vars(session), "vocabulary": vocabulary})
    rows, engine = generate(stopping, small_batch(session, 2))
    assert {len(row.completion_tokens) for row in rows.values()} == {1}
    assert engine.stats.decode_steps == 1
