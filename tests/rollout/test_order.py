"""Caches in another order in memory: the same answers, and nothing moves between two calls."""

import dataclasses
import operator

import jax
import pytest

from speciarl_jax.rollout import order
from speciarl_jax.rollout.cache import KeyValues
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.sampling import Sampling
from tests.rollout.test_sharded import assert_same_answers, make_mesh
from tests.support.tiny_policy import open_small_session, small_batch, states

K_ORDER, V_ORDER = (0, 2, 4, 1, 3), (0, 2, 3, 1, 4)
order_of = operator.attrgetter("format.layout.major_to_minor")


@pytest.fixture(scope="module")
def session():
    return open_small_session()


def engine_of(session, **placement):
    config = dataclasses.replace(
        session.config.rollout, max_completion_tokens=4, chunk_tokens=2, compact=True
    )
    mesh = make_mesh(1, 1, 1)
    engine = RolloutEngine(session.parts.graphdef, config, session.vocabulary, mesh)
    engine.placement = dataclasses.replace(engine.placement, is_unrolled=False, **placement)
    return engine


def answers(session, engine, batch):
    embeds = session.encode(states(session), batch)
    options = {"group_size": 2, "sampling": Sampling(), "seed": 1, "step": 1}
    rows = {}
    for finished in engine.generate(states(session), batch, embeds, **options):
        rows |= {(row.prompt, row.sample): row for row in finished}
    return rows


def test_the_order_of_caches_changes_no_token(session, monkeypatch):
    """As XLA for TPU wants them, here on a CPU; moved once for each size, not in every call."""
    batch, seen = small_batch(session, 2), []
    monkeypatch.setattr(order, "_read", lambda *_: (K_ORDER, V_ORDER))
    in_order = order.in_order

    def watched(own, orders):
        shape, before = own.v.shape, order_of(own.k)
        moved = in_order(own, orders)
        seen.append((shape, before, order_of(moved.k), order_of(moved.v)))
        return moved

    monkeypatch.setattr(order, "in_order", watched)
    expected = answers(session, engine_of(session), batch)
    assert seen == []
    found = answers(session, engine_of(session, orders_caches=True), batch)
    assert_same_answers(found, expected, atol=0)
    assert {(k, v) for _, _, k, v in seen} == {(K_ORDER, V_ORDER)}
    is_moved = [(shape, k != K_ORDER) for shape, k, _, _ in seen]
    assert all(is_moved.count((shape, True)) == 1 for shape, _ in is_moved)


def test_the_order_is_read_from_the_loop_compiled_with_free_layouts(session):
    """XLA for CPU likes row by row, so that nothing moves; read once for a size."""
    batch = small_batch(session, 2)
    engine = engine_of(session, orders_caches=True)
    order._known.clear()
    rows = answers(session, engine, batch)
    assert rows
    assert set(order._known.values()) == {((0, 1, 2, 3, 4),) * 2}
    count = len(order._known)
    answers(session, engine, batch)
    assert len(order._known) == count


def test_a_cache_is_moved_array_by_array():
    x = jax.numpy.arange(24.0).reshape(2, 3, 4)
    own = KeyValues(x, x + 1)
    moved = order.in_order(own, ((2, 0, 1), (0, 1, 2)))
    assert order_of(moved.k) == (2, 0, 1)
    assert x.is_deleted()
    assert moved.v is own.v
    assert order.in_order(moved, ((2, 0, 1), (0, 1, 2))).k is moved.k
