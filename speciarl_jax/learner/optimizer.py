"""The optimiser: clipped AdamW over the trainable state.

An update that is not finite is skipped and counted; one without a trained token is skipped, as
momentum and weight decay would move the parameters without any lesson.
"""

from __future__ import annotations

import dataclasses
from typing import Generic

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from speciarl_jax.config.schema import OptimConfig
from speciarl_jax.devices.layout import Leaf, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptimState(Generic[Leaf]):
    """Optax state and the counters of updates.

    Attributes:
        inner: optax state, float32.
        num_updates: [] int32 applied updates; drives the schedule.
        num_skipped_in_row: [] int32 non-finite gradients since the last applied update.
    """

    inner: PyTree
    num_updates: Leaf
    num_skipped_in_row: Leaf


def learning_rate_schedule(config: OptimConfig, num_updates: int) -> optax.Schedule:
    """The learning rate as a function of applied updates; decaying shapes end at `num_updates`.

    Raises:
        ValueError: unknown schedule.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(num_updates - warmup, 1)
    shapes = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    }
    if config.schedule not in shapes:
        raise ValueError(f"optim.schedule={config.schedule!r}: expected one of {', '.join(shapes)}")
    body = shapes[config.schedule]()
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def make_optimizer(config: OptimConfig, num_updates: int) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW. Source: method.md section 2 (verl's AdamW settings)."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, num_updates),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
        ),
    )


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Params) -> OptimState:
    """Fresh state, float32 moments."""
    as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return OptimState(
        optimizer.init(as_float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    )


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: OptimState,
    trainable: Params,
    num_tokens: Array | float,
) -> tuple[Params, OptimState, Array]:
    """One update, or none if the gradient is not finite or comes from no token.

    Args:
        optimizer: of `state`.
        grads: float32, summed over the mini-batch.
        state: before.
        trainable: before.
        num_tokens: [] trained tokens of the mini-batch, those of weight above 0.

    Returns:
        (new trainable, new state, global gradient norm before clipping).
    """
    norm = optax.global_norm(grads)
    is_finite = jnp.isfinite(norm)
    is_applied = is_finite & (jnp.asarray(num_tokens) > 0)
    updates, inner = optimizer.update(grads, state.inner, trainable)
    updated = optax.apply_updates(trainable, updates)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(is_applied, new, old)

    new_state = OptimState(
        inner=jax.tree.map(choose, inner, state.inner),
        num_updates=state.num_updates + is_applied,
        # An update without tokens has no gradient to judge: it neither adds to the row nor ends it.
        num_skipped_in_row=jnp.where(is_applied, 0, state.num_skipped_in_row + ~is_finite),
    )
    return jax.tree.map(choose, updated, trainable), new_state, norm
