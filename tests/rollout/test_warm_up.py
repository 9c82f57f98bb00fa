"""After the warm-up nothing is compiled, whatever lengths the answers turn out to have."""

import dataclasses

import numpy as np
import pytest

from speciarl_jax.config.schema import Config
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.layout import column_sizes
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.rollout.warm_up import BatchShapes, warm_up
from speciarl_jax.timing import num_compiled
from tests.support.tiny_policy import open_small_session, small_batch, states


@pytest.fixture(scope="module")
def session():
    return open_small_session()


def stopping_vocabulary(vocabulary, every):
    """Ends answers on about one token in `every`."""
    stops = np.flatnonzero(~vocabulary.banned)[::every].astype(np.int32)
    return dataclasses.replace(vocabulary, stop_ids=np.resize(stops, 60))


def run_both(session, sizes, has_few_sizes=False, **changes):
    """(programs compiled by warm-up, by a second warm-up, and by rollouts of several lengths)."""
    config = dataclasses.replace(session.config.rollout, **changes)
    vocabulary = stopping_vocabulary(session.vocabulary, 10)
    engine = RolloutEngine(session.parts.graphdef, config, vocabulary, session.sampling_mesh)
    if has_few_sizes:  # as on a GPU
        engine.has_few_sizes = True
        engine.columns = column_sizes(config.chunk_tokens, config.max_completion_tokens, True, True)
    shapes = BatchShapes(sizes[0], sizes[1], (48,), (6,))

    def warm() -> int:
        vision = session.arch.vision
        return warm_up(
            engine, states(session), session.encode, vision, shapes, sampling=Sampling(), seed=3
        )

    first, second, before = warm(), warm(), num_compiled()
    batch, in_rollouts = small_batch(session, sizes[0]), 0
    for every in (2, 10, 40, 400):
        engine.vocabulary = stopping_vocabulary(session.vocabulary, every)
        embeds = session.encode(states(session), batch)
        options = {"group_size": sizes[1], "sampling": Sampling(), "seed": 3, "step": every}
        list(engine.generate(states(session), batch, embeds, **options))
        in_rollouts += engine.stats.recompilations
    assert num_compiled() - before == in_rollouts
    return first, second, in_rollouts


def test_warm_up_leaves_nothing_to_compile(session):
    first, second, later = run_both(session, (2, 3), compact=False, max_completion_tokens=5)
    # encode, prefill, keys, fork, decode; what earlier tests have compiled is not counted again.
    assert 1 <= first <= 5
    assert (second, later) == (0, 0)


@pytest.mark.slow
def test_warm_up_reaches_every_size_of_compaction(session):
    first, second, later = run_both(session, (4, 5), compact=True, chunk_tokens=4)
    # rows 20, 15, 12, 9, 7, 6, 5, 3, 2, 1; columns 4, 8, 16: 30 decode, 27 shrink, 20 widen.
    assert 77 <= first <= 81
    assert (second, later) == (0, 0)


@pytest.mark.slow
def test_warm_up_reaches_every_size_of_a_gpu(session):
    first, second, later = run_both(session, (4, 6), True, compact=True, chunk_tokens=3)
    # rows 24, 6, 2; columns 4, 16: 6 decode, 4 shrink, 3 widen.
    assert 13 <= first <= 17
    assert (second, later) == (0, 0)


def test_a_caller_that_compiles_between_chunks_is_not_counted(session):
    import jax

    config = dataclasses.replace(session.config.rollout, compact=False, max_completion_tokens=5)
    vocabulary = stopping_vocabulary(session.vocabulary, 10)
    engine = RolloutEngine(session.parts.graphdef, config, vocabulary, session.sampling_mesh)
    batch = small_batch(session, 2)
    embeds = session.encode(states(session), batch)
    options = {"group_size": 3, "sampling": Sampling(), "seed": 3, "step": 1}
    list(engine.generate(states(session), batch, embeds, **options))
    for rows in engine.generate(states(session), batch, embeds, **options):
        before = num_compiled()
        jax.jit(lambda x: x * 3 + 1)(np.zeros(7 + len(rows)))
        assert num_compiled() == before + 1
    assert engine.stats.recompilations == 0


def test_warm_up_without_buckets_is_refused():
    config = Config()
    config.rollout.warm_up = True
    with pytest.raises(ValueError, match=r"data\.prompt_buckets"):
        config.validate()
