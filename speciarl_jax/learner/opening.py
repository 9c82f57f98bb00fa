"""One opening of the training state: by shape for a plan, with arrays for a run.

    policy -> + adapter -> split into (trainable, frozen) -> a place on the mesh for each leaf
           -> optimiser moments, each where its parameter lies

`abstract_*` evaluate this for shapes (nothing is allocated), `open_*` for arrays; both take their
places from the same rules, so what `speciarl plan` compiles is what a run calls.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config, ModelConfig
from speciarl_jax.devices.layout import (
    Params,
    optimizer_shardings,
    param_shardings,
    place,
    replicated,
)
from speciarl_jax.learner.optimizer import OptimState, init_optimizer
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, PolicyParts, split_policy

Tree = TypeVar("Tree")


def model_dtypes(model: ModelConfig) -> Dtypes:
    """Storage and compute dtype of a recipe."""
    return Dtypes(jnp.dtype(model.param_dtype), jnp.dtype(model.compute_dtype))


def with_adapter(config: Config, policy: Policy) -> Policy:
    """The same policy, with the recipe's adapter on it if it trains one."""
    if config.has_adapter:
        add_lora(policy, config.lora, config.seed)
    return policy


def split_for(config: Config, policy: Policy) -> PolicyParts:
    """Takes a policy apart into what the recipe trains and the rest."""
    model = config.model
    return split_policy(policy, train_base=model.train_base, train_vision=model.train_vision)


def abstract_parts(config: Config, arch: Arch, mesh: Mesh) -> PolicyParts:
    """The policy of a recipe by shape and place, on real or planned devices."""
    dtypes = model_dtypes(config.model)

    def make() -> Policy:
        return with_adapter(config, Policy(arch, dtypes=dtypes, rngs=nnx.Rngs(0)))

    parts = split_for(config, nnx.eval_shape(make))
    return dataclasses.replace(
        parts,
        trainable=place_shapes(parts.trainable, mesh),
        frozen=place_shapes(parts.frozen, mesh),
    )


def open_parts(config: Config, policy: Policy, mesh: Mesh) -> PolicyParts:
    """A policy in memory, adapter included, taken apart and laid out on the mesh."""
    parts = split_for(config, policy)
    return dataclasses.replace(
        parts,
        trainable=place(parts.trainable, param_shardings(parts.trainable, mesh)),
        frozen=place(parts.frozen, param_shardings(parts.frozen, mesh)),
    )


def place_shapes(state: Params, mesh: Mesh) -> Params:
    """ShapeDtypeStructs of parameters with their places on a mesh."""
    return _with_places(state, param_shardings(state, mesh))


def _with_places(tree: Tree, places: PyTree[NamedSharding]) -> Tree:
    placed: Tree = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places
    )
    return placed


def optim_shardings(
    optimizer: optax.GradientTransformation, optim: OptimState, trainable: Params, mesh: Mesh
) -> OptimState[NamedSharding]:
    """A place for each leaf of the optimiser's state, from arrays or from ShapeDtypeStructs."""
    places = param_shardings(trainable, mesh)
    moments = optimizer_shardings(optimizer, optim.inner, places, mesh)
    return OptimState[NamedSharding](moments, replicated(mesh), replicated(mesh))


def abstract_optim(
    optimizer: optax.GradientTransformation, trainable: Params, mesh: Mesh
) -> OptimState:
    """`open_optim` by shape and place."""
    optim = jax.eval_shape(functools.partial(init_optimizer, optimizer), trainable)
    return _with_places(optim, optim_shardings(optimizer, optim, trainable, mesh))


def open_optim(
    optimizer: optax.GradientTransformation, trainable: Params, mesh: Mesh
) -> OptimState:
    """Fresh moments, laid out on the mesh."""
    optim = init_optimizer(optimizer, trainable)
    return place(optim, optim_shardings(optimizer, optim, trainable, mesh))
