"""The whole policy, and how it is taken apart at jit boundaries.

`split` gives (graphdef, trainable, frozen): programs take the graphdef as a static argument,
differentiate and donate `trainable` only, and put the model together again inside the trace. The
reference policy is `reference_graphdef` merged with the same frozen arrays: no second copy.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from speciarl_jax.arch import Arch
from speciarl_jax.devices.layout import Params
from speciarl_jax.policy.layers import Dtypes, LoRAParam
from speciarl_jax.policy.text import TextModel
from speciarl_jax.policy.vision import VisionTower


class Policy(nnx.Module):
    """Qwen2.5-VL: `visual` and `text`."""

    def __init__(self, arch: Arch, *, dtypes: Dtypes, rngs: nnx.Rngs) -> None:
        """Creates a randomly initialised model; see `abstract_policy` for one without arrays."""
        self.visual = VisionTower(arch.vision, dtypes=dtypes, rngs=rngs)
        self.text = TextModel(arch.text, dtypes=dtypes, rngs=rngs)
        self.arch = arch

    def encode(
        self,
        patches: Float[Array, "I N patch_dim"],
        positions: Int[Array, "I N 2"],
        mask: Array,
        remat: str = "none",
        mesh: Mesh | None = None,
    ) -> Float[Array, "IM D"]:
        """Image embeddings of a batch as one table, rows in padded window order."""
        merged = self.visual(patches, positions, mask, remat, mesh)
        return jnp.reshape(merged, (-1, merged.shape[-1]))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B 3 T"],
        lengths: Int[Array, " B"],
        image_rows: Int[Array, "B T"] | None = None,
        image_embeds: Float[Array, "IM D"] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """Final hidden states of plain left-aligned sequences (no sharing, no cache)."""
        hidden = self.text.embed(tokens, image_rows, image_embeds)
        return self.text.forward(hidden, positions, lengths, remat)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def encode_images(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    patches: Array,
    positions: Array,
    mask: Array,
    mesh: Mesh | None = None,
) -> Float[Array, "IM D"]:
    """`Policy.encode`, jitted for frozen use."""
    return nnx.merge(graphdef, *states).encode(patches, positions, mask, mesh=mesh)


def abstract_policy(arch: Arch, dtypes: Dtypes) -> Policy:
    """The policy with ShapeDtypeStructs in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: Policy(arch, dtypes=dtypes, rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """A policy taken apart.

    Attributes:
        graphdef: structure of the policy with its adapter; hashable, static under jit.
        reference_graphdef: structure without the adapter.
        trainable: what the optimiser updates: the adapter, or chosen base weights.
        frozen: the rest; with an adapter this is the whole base model.
    """

    graphdef: nnx.GraphDef[Policy]
    reference_graphdef: nnx.GraphDef[Policy]
    trainable: Params
    frozen: Params


def trainable_filter(train_base: bool, train_vision: bool) -> nnx.filterlib.Filter:
    """Which variables an update may change: the adapter, the text's own weights, the tower's."""
    filters: list[nnx.filterlib.Filter] = [LoRAParam]
    if train_base:
        filters.append(lambda path, _: path[0] == "text")
    if train_vision:
        filters.append(lambda path, _: path[0] == "visual")
    return nnx.Any(*filters)


def split_policy(
    policy: Policy, *, train_base: bool = False, train_vision: bool = False
) -> PolicyParts:
    """Takes a policy apart for training."""
    chosen = trainable_filter(train_base, train_vision)
    graphdef, *states = nnx.split(policy, chosen, ...)
    trainable, frozen = states
    reference = nnx.graphdef(abstract_policy(policy.arch, policy_dtypes(policy)))
    return PolicyParts(graphdef, reference, trainable, frozen)


def policy_dtypes(policy: Policy) -> Dtypes:
    """The dtypes that `policy` was made with."""
    return Dtypes(param=policy.text.embedding.dtype, compute=policy.text.dtype)


def count_parameters(state: Params) -> int:
    """Number of scalars in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))
