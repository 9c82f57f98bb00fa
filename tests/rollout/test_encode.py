"""Encoding the smaller images by themselves gives the table of one call, row for row."""

import dataclasses

import numpy as np
import pytest

from speciarl_jax.plan.programs import abstract_session, encode_program
from speciarl_jax.plan.shapes import plan_shapes
from speciarl_jax.policy.model import encode_images
from speciarl_jax.rollout.encode import encode_by_size
from tests.support.tiny_policy import open_small_session, small_batch, states


@pytest.mark.parametrize(
    ("count", "buckets", "calls"), [(1, (), 1), (4, (6,), 1), (5, (1, 6), 2), (5, (), 2)]
)
def test_halves_equal_one_call(count, buckets, calls, monkeypatch):
    session = open_small_session()
    vision = small_batch(session, count).vision
    unit = session.arch.vision.window_patches
    mask = vision.mask.copy()
    mask[:1] = True
    mask[1:4, unit:] = False  # the last of them, if there are five, is large again
    vision = dataclasses.replace(vision, mask=mask)
    graphdef = session.parts.graphdef
    arrays = (vision.patches, vision.positions, vision.mask)
    expected = np.asarray(encode_images(graphdef, states(session), *arrays))
    shapes = []

    def counted(*args):
        shapes.append(args[2].shape[:2])
        assert args[5] is None  # no mesh was given
        return encode_images(*args)

    monkeypatch.setattr("speciarl_jax.rollout.encode.encode_images", counted)
    found = np.asarray(encode_by_size(graphdef, states(session), vision, unit, buckets))
    assert len(shapes) == calls
    assert sum(images for images, _ in shapes) == count
    assert (shapes[0][1] < mask.shape[1]) == (calls == 2)
    assert found.shape == expected.shape
    is_real = mask[:, :: session.arch.vision.merge_unit].reshape(-1)
    np.testing.assert_allclose(found[is_real], expected[is_real], atol=1e-5)


def test_a_run_on_one_device_names_it_so_that_its_kernel_is_used(monkeypatch):
    """As `plan` compiles it: without the mesh a GPU or a single TPU would use plain attention."""
    session, meshes = open_small_session(), []

    def noted(*args):
        meshes.append(args[5])
        return encode_images(*args)

    monkeypatch.setattr("speciarl_jax.rollout.encode.encode_images", noted)
    session.encode(states(session), small_batch(session, 5))
    shapes = plan_shapes(session.config, session.arch, dict(session.mesh.shape), 1)
    planned = encode_program(abstract_session(session.config, session.arch, session.mesh), shapes)
    assert meshes == [session.sampling_mesh] * len(meshes) != []
    assert planned.args[-1] == meshes[0]
