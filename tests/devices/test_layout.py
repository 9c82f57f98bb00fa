"""One, two, four and eight devices give the same update; parameters lie where the rules say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import MeshConfig, OptimConfig
from speciarl_jax.devices import layout
from speciarl_jax.devices.mesh import check_mesh, choose_mesh, make_mesh, mesh_shape
from speciarl_jax.learner import batches, update
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from tests.support.groups import make_batch, settings
from tests.support.tiny_policy import jolt, open_small_session, tiny_dir

SHAPES = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 2, 2), (8, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def session():
    return jolt(open_small_session(), scale=0.15)


def on_mesh(session, shape, train, config):
    """One update of 8 prompts on a mesh of `shape`; (trainable, optimiser state, statistics)."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), 10)
    trainable, frozen = (
        jax.device_put(jax.tree.map(jnp.array, part), layout.param_shardings(part, mesh))
        for part in (session.parts.trainable, session.parts.frozen)
    )
    state = init_optimizer(optimizer, trainable)
    config = dataclasses.replace(config, mesh=mesh)
    micro = batches.micro_batches(train, slice(0, 8), 8)
    micro = layout.place_prompts(micro, mesh, axis=1)
    return update.update_step(
        session.parts.graphdef,
        trainable,
        frozen,
        state,
        micro,
        session.vocabulary.banned,
        optimizer,
        config,
    )


def assert_same_update(session, shapes, config):
    _, _, train = make_batch(session, num_prompts=8)
    alone = on_mesh(session, shapes[0], train, config)
    assert float(alone[2]["grad_norm"]) > 0
    assert float(alone[2]["tokens"]) == np.sum(train.weights > 0)
    for shape in shapes[1:]:
        spread = on_mesh(session, shape, train, config)
        for name, value in alone[2].items():
            np.testing.assert_allclose(
                spread[2][name], value, rtol=2e-6, atol=2e-6, err_msg=f"{shape} {name}"
            )
        # Adam's moments are the clipped gradient and its square; the parameters themselves move by
        # the gradient's sign where it is near zero.
        moments = (jax.tree.leaves(found[1].inner) for found in (alone, spread))
        for a, b in zip(*moments, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * float(np.abs(b).max()))


def test_two_devices_give_the_same_update(session):
    assert_same_update(session, [(1, 1, 1), (1, 1, 2)], settings())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["policy", "gspo", "sft"])
def test_any_mesh_gives_the_same_update(session, objective):
    assert_same_update(session, SHAPES, settings(objective=objective))


def test_state_keeps_its_layout(session):
    """What an update returns lies where it came from, else the next step compiles again."""
    _, _, train = make_batch(session, num_prompts=8)
    trainable, optim, _ = on_mesh(session, (1, 1, 2), train, settings())
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    wanted = layout.param_shardings(trainable, mesh)
    for leaf, place in zip(jax.tree.leaves(trainable), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    moments = [leaf for leaf in jax.tree.leaves(optim.inner) if leaf.ndim]
    assert any(not leaf.sharding.is_fully_replicated for leaf in moments)


def test_rules():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    spec = layout.param_spec
    column, row = ("text", "blocks", "q_proj"), ("text", "blocks", "mlp", "down_proj")
    assert spec((*column, "kernel"), (4, 64, 32), mesh) == PartitionSpec(None, "fsdp", "tensor")
    assert spec((*column, "bias"), (4, 32), mesh) == PartitionSpec(None, "tensor")
    assert spec((*column, "lora_a"), (4, 64, 8), mesh) == PartitionSpec(None, "fsdp", None)
    assert spec((*column, "lora_b"), (4, 8, 32), mesh) == PartitionSpec(None, None, "tensor")
    assert spec((*row, "kernel"), (4, 32, 64), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert spec((*row, "lora_a"), (4, 32, 8), mesh) == PartitionSpec(None, "tensor", None)
    assert spec(("text", "embedding"), (100, 64), mesh) == PartitionSpec("tensor", "fsdp")
    assert spec(("text", "embedding"), (101, 64), mesh) == PartitionSpec(None, "fsdp")
    vision = ("visual", "blocks", "qkv", "kernel")
    assert spec(vision, (4, 32, 96), mesh) == PartitionSpec(None, "fsdp", None)
    assert spec(("text", "norm", "weight"), (64,), mesh) == PartitionSpec(None)


def test_every_large_parameter_is_cut(session):
    """A renamed layer must not silently lie whole on every device."""
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    for path, leaf in nnx.to_flat_state(session.parts.frozen):
        if path[0] == "text" and leaf.get_value().ndim - ("blocks" in path) >= 2:
            spec = layout.param_spec(path, leaf.get_value().shape, mesh)
            assert set(spec) == {None, "fsdp", "tensor"} or set(spec) == {"fsdp", "tensor"}, path


@pytest.mark.parametrize(
    ("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, 8), (1, 1, 8))]
)
def test_axis_sizes(sizes, shape):
    assert mesh_shape(MeshConfig(*sizes), 8) == shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 8)])
def test_axis_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="does not make 8 devices"):
        mesh_shape(MeshConfig(*sizes), 8)


def test_auto_takes_the_smallest_replica_that_fits():
    arch = Arch.from_dir(tiny_dir())
    heads = arch.text.num_kv_heads
    assert heads == 2
    gigabytes = 10**9
    config, reason = choose_mesh(arch, 4 * gigabytes, 16, 8, 16 * gigabytes)
    assert (config.fsdp, config.tensor) == (1, 1)
    config, reason = choose_mesh(arch, 14 * gigabytes, 16, 8, 16 * gigabytes)
    assert (config.fsdp, config.tensor) == (1, 2)
    assert "8 replicas" in reason
    config, reason = choose_mesh(arch, 28 * gigabytes, 16, 8, 16 * gigabytes)
    assert (config.fsdp, config.tensor) == (2, 2)
    with pytest.raises(ValueError, match="do not fit 8 devices"):
        choose_mesh(arch, 600 * gigabytes, 16, 8, 16 * gigabytes)
    with pytest.raises(ValueError, match="divisor of 2"):
        check_mesh(make_mesh(MeshConfig(1, 1, 8)), arch)
