"""Where a rollout's arrays live on a mesh.

Prompts and rows are flat axes made of one equal block per shard; a shard is a place of the mesh's
data and fsdp axes. A group's rows lie in the block of its prompt, and the index maps between rows
and prompts count from the start of a block, so no row, query or cache ever crosses shards. Without
a mesh there is one block and nothing to constrain.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from speciarl_jax.devices.layout import PROMPT_AXES, cache_sharding, prompt_sharding
from speciarl_jax.devices.mesh import num_replicas
from speciarl_jax.policy.text import TextModel


@dataclasses.dataclass(frozen=True)
class Placement:
    """Static under jit.

    Attributes:
        mesh: devices of this process, axes data, fsdp, tensor; None for one device.
        has_early_exit: the decode loop looks at the rows of all shards, which is a collective; a
            part of a TPU v6e slice runs none.
        is_unrolled: a decode step names its layers instead of scanning them. On CPU a scan copies
            each layer's weights and cache out of their stacks in every step; an accelerator reads
            them in place, and unrolled would hold the weights twice.
        orders_caches: the decode loop's caches lie as its compiler likes best, see
            `rollout.order`.
    """

    mesh: Mesh | None = None
    has_early_exit: bool = True
    is_unrolled: bool = False
    orders_caches: bool = False

    @classmethod
    def of_run(cls, mesh: Mesh | None, has_early_exit: bool) -> Placement:
        """For the devices of this process, in the form that suits them."""
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        is_cpu, is_tpu = device.platform == "cpu", device.platform == "tpu"
        return cls(mesh, has_early_exit, is_unrolled=is_cpu, orders_caches=is_tpu)

    @property
    def has_few_sizes(self) -> bool:
        """On GPU a smaller batch gains little, for steps read the weights; compiling takes long."""
        return self.mesh is not None and self.mesh.devices.flat[0].platform == "gpu"

    @property
    def num_shards(self) -> int:
        """Blocks that prompts and rows consist of."""
        return num_replicas(self.mesh) if self.mesh else 1

    @property
    def tensor(self) -> int:
        """Devices that share a shard's heads, columns and vocabulary."""
        return int(self.mesh.shape["tensor"]) if self.mesh else 1

    def rows(self, x: Array) -> Array:
        """Pins an array whose leading axis is prompts or rows."""
        if self.mesh is None:
            return x
        pinned: Array = jax.lax.with_sharding_constraint(x, prompt_sharding(self.mesh))
        return pinned

    def logits(self, x: Float[Array, "R V"]) -> Float[Array, "R2 V"]:
        """Scores as the head leaves them, vocabulary over `tensor`, then as `spread` has rows.

        The first place must be named: left alone, XLA gathers the head instead, in every step.
        """
        if self.mesh is None or self.tensor == 1:
            return self.rows(x)
        place = NamedSharding(self.mesh, PartitionSpec(PROMPT_AXES, "tensor"))
        pinned: Array = jax.lax.with_sharding_constraint(x, place)
        return self.spread(pinned)

    def spread(self, x: Array) -> Array:
        """Rows over `tensor` too, so that each device draws tokens for its own.

        A shard's block is filled up to a multiple of `tensor` with rows that `joined` drops.
        """
        if self.mesh is None or self.tensor == 1:
            return x
        blocks = x.reshape(self.num_shards, -1, *x.shape[1:])
        fill = [(0, 0)] * blocks.ndim
        fill[1] = (0, -blocks.shape[1] % self.tensor)
        filled = jnp.pad(blocks, fill).reshape(-1, *x.shape[1:])
        place = NamedSharding(self.mesh, PartitionSpec((*PROMPT_AXES, "tensor")))
        pinned: Array = jax.lax.with_sharding_constraint(filled, place)
        return pinned

    def joined(self, x: Array, num_rows: int) -> Array:
        """Undoes `spread`: `num_rows` rows, block by block."""
        if self.mesh is None or self.tensor == 1:
            return self.rows(x)
        blocks = x.reshape(self.num_shards, -1, *x.shape[1:])
        kept = blocks[:, : num_rows // self.num_shards]
        return self.rows(kept.reshape(num_rows, *x.shape[1:]))

    def cache(self, x: Array, *, is_stacked: bool) -> Array:
        """Pins [L, X, K, ...], without L if not stacked: X over the shards, heads over `tensor`."""
        if self.mesh is None:
            return x
        place = cache_sharding(self.mesh, is_stacked=is_stacked)
        pinned: Array = jax.lax.with_sharding_constraint(x, place)
        return pinned

    def take(self, x: Array, index: Int[Array, " n"], axis: int = 0) -> Array:
        """Elements of an axis; `index` counts, block by block, from the start of the block."""
        if self.num_shards == 1:
            return jnp.take(x, index, axis=axis)
        blocks = x.reshape(*x.shape[:axis], self.num_shards, -1, *x.shape[axis + 1 :])

        def take_block(block: Array, local: Array) -> Array:
            return jnp.take(block, local, axis=axis)

        taken = jax.vmap(take_block, in_axes=(axis, 0), out_axes=axis)(
            blocks, index.reshape(self.num_shards, -1)
        )
        return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def embed(
        self,
        text: TextModel,
        tokens: Int[Array, "P S"],
        image_rows: Int[Array, "P S"],
        image_embeds: Float[Array, "IM D"],
    ) -> Float[Array, "P S D"]:
        """Embedded prompts; `image_rows` count from the start of a shard's block of the table."""
        if self.num_shards == 1:
            return text.embed(tokens, image_rows, image_embeds)
        tokens, image_rows, table = (
            self.rows(x.reshape(self.num_shards, -1, x.shape[-1]))
            for x in (tokens, image_rows, image_embeds)
        )
        hidden = jax.vmap(text.embed)(tokens, image_rows, table)
        return self.rows(hidden.reshape(-1, *hidden.shape[2:]))
