"""The same answers on one device and on meshes of two, four and eight."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from speciarl_jax.devices.layout import image_sharding, param_shardings
from speciarl_jax.policy.model import encode_images
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.timing import num_compiled
from tests.support.tiny_policy import jolt, open_small_session, small_batch


@pytest.fixture(scope="module")
def session():
    return jolt(open_small_session(), scale=0.15)


def make_mesh(data, fsdp, tensor):
    devices = np.asarray(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def sample(session, batch, mesh, *, group_size=2, **changes):
    """Answers by (prompt, sample), the engine, and programs compiled by a second run."""
    states = (session.parts.trainable, session.parts.frozen)
    vision = (batch.vision.patches, batch.vision.positions, batch.vision.mask)
    if mesh is not None:
        states = tuple(jax.device_put(s, param_shardings(s, mesh)) for s in states)
        vision = jax.device_put(vision, image_sharding(mesh, len(vision[0])))
    config = dataclasses.replace(session.config.rollout, **changes)
    engine = RolloutEngine(session.parts.graphdef, config, session.vocabulary, mesh)
    for _ in range(2):
        rows, compiled = {}, num_compiled()
        embeds = encode_images(session.parts.graphdef, states, *vision)
        for finished in engine.generate(
            states, batch, embeds, group_size=group_size, sampling=Sampling(), seed=1, step=0
        ):
            rows |= {(row.prompt, row.sample): row for row in finished}
    return rows, engine, num_compiled() - compiled


def assert_same_answers(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_array_equal(found[key].completion_tokens, row.completion_tokens)
        np.testing.assert_allclose(found[key].logprobs, row.logprobs, atol=atol)
        assert found[key].is_truncated == row.is_truncated


def test_two_shards_sample_what_one_device_samples(session):
    batch = small_batch(session, 4)
    expected, _, _ = sample(session, batch, None, max_completion_tokens=6)
    found, _, recompiled = sample(session, batch, make_mesh(2, 1, 1), max_completion_tokens=6)
    assert_same_answers(found, expected)
    assert recompiled == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 2), (8, 1, 1), (1, 1, 2), (2, 2, 2), (4, 1, 2)], ids=str)
def test_any_mesh_samples_what_one_device_samples(session, shape):
    batch = small_batch(session, 7, rows=8)
    expected, _, _ = sample(session, batch, None, group_size=3)
    found, _, recompiled = sample(session, batch, make_mesh(*shape), group_size=3)
    assert_same_answers(found, expected)
    assert recompiled == 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["compute", "int8"])
def test_shards_compact_to_the_fullest(session, kv_cache_dtype):
    stops = np.flatnonzero(~session.vocabulary.banned)[::10].astype(np.int32)
    vocabulary = dataclasses.replace(session.vocabulary, stop_ids=stops)
    stopping = dataclasses.replace(session, vocabulary=vocabulary)
    batch = small_batch(session, 8)
    changes = {"compact": True, "chunk_tokens": 4, "kv_cache_dtype": kv_cache_dtype}
    expected, one, _ = sample(stopping, batch, None, group_size=4, **changes)
    found, four, recompiled = sample(stopping, batch, make_mesh(4, 1, 2), group_size=4, **changes)
    # A difference in the last bit can round to another int8 value.
    assert_same_answers(found, expected, atol=1e-5 if kv_cache_dtype == "compute" else 5e-3)
    assert recompiled == 0
    assert one.stats.live_steps == four.stats.live_steps
    assert four.stats.slot_steps < 32 * four.stats.decode_steps  # some rows were dropped


def test_prompts_must_divide_over_the_shards(session):
    engine = RolloutEngine(
        session.parts.graphdef, session.config.rollout, session.vocabulary, make_mesh(2, 1, 1)
    )
    states = (session.parts.trainable, session.parts.frozen)
    batch = small_batch(session, 3)
    with pytest.raises(ValueError, match="3 prompts does not divide over 2 shards"):
        engine.plan_waves(states, batch, 3 * 96, 2, Sampling())
