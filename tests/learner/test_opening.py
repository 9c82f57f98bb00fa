"""A plan and a run open the same training state: one by shape, the other with arrays."""

import jax
import pytest

from speciarl_jax.learner.opening import abstract_optim, abstract_parts, open_optim
from speciarl_jax.learner.optimizer import make_optimizer
from tests.support.tiny_policy import open_small_session


def described(tree):
    """(path, shape, dtype, whether it lies where the other does) of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, x.dtype, x.sharding) for path, x in leaves]


def assert_same(abstract, arrays):
    expected, found = described(abstract), described(arrays)
    assert [row[:3] for row in expected] == [row[:3] for row in found]
    for (path, shape, _, planned), (*_, place) in zip(expected, found, strict=True):
        assert planned.is_equivalent_to(place, len(shape)), path


@pytest.mark.parametrize("train_base", [False, True])
def test_shapes_and_places_are_those_of_a_run(train_base):
    session = open_small_session(
        mesh__data=1, mesh__tensor=2, model__train_base=train_base, algo__kl_coef=0.0
    )
    parts = abstract_parts(session.config, session.arch, session.mesh)
    assert_same(parts.trainable, session.parts.trainable)
    assert_same(parts.frozen, session.parts.frozen)
    is_adapter = ["lora" in row[0] for row in described(parts.trainable)]
    assert is_adapter == [not train_base] * len(is_adapter)
    optimizer = make_optimizer(session.config.optim, 10)
    optim = open_optim(optimizer, session.parts.trainable, session.mesh)
    planned = abstract_optim(optimizer, parts.trainable, session.mesh)
    assert_same(planned, optim)
