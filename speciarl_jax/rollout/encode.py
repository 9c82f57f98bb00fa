"""Encoding images of mixed sizes: the smaller half does not pay for the larger one's padding.

all padded to the largest | wwwwww |      halves | ww |  smaller images
| ww.... |             | w. |
| wwwww. |             | wwwwww |  larger images
| w..... |             | wwwww. |
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from speciarl_jax.data.collate import window_bucket
from speciarl_jax.data.images import VisionArrays
from speciarl_jax.devices.layout import Params
from speciarl_jax.policy.model import Policy, encode_images


def encode_by_size(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    vision: VisionArrays,
    window_patches: int,
    buckets: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Float[Array, "IM D"]:
    """The table of `policy.model.encode_images` on one device, with less padding encoded.

    If the smaller half of the images fits into a smaller bucket it is encoded by itself. Shapes
    are those of the buckets: as many more programs, and a small one per pair to join them.

    Args:
        graphdef, states: the whole policy, taken apart.
        vision: arrays of the batch.
        window_patches: patches in a window.
        buckets: padded windows of an image, as the batch was collated with.
        mesh: of the one device; its platform chooses the attention kernel.
    """
    count, length = vision.mask.shape
    used = vision.mask.reshape(count, -1, window_patches).any(axis=-1).sum(axis=-1)
    order = np.argsort(used, kind="stable")
    half = -(-count // 2)
    small = window_bucket(max(int(used[order[half - 1]]), 1), buckets) * window_patches
    if count < 2 or small >= length:
        arrays = (vision.patches, vision.positions, vision.mask)
        whole: Array = encode_images(graphdef, states, *arrays, mesh)
        return whole
    tables = []
    for images, size in ((order[:half], small), (order[half:], length)):
        chosen = (x[images, :size] for x in (vision.patches, vision.positions, vision.mask))
        table: Array = encode_images(graphdef, states, *chosen, mesh)
        tables.append(table.reshape(len(images), -1, table.shape[-1]))
    joined: Array = _join(*tables, np.argsort(order))
    return joined


@jax.jit
def _join(small: Array, large: Array, order: Array) -> Array:
    small = jnp.pad(small, ((0, 0), (0, large.shape[1] - small.shape[1]), (0, 0)))
    return jnp.take(jnp.concatenate([small, large]), order, axis=0).reshape(-1, large.shape[-1])
