"""The update: log-probs on the shared-prefix tree, loss, accumulated gradients, one optimiser step.

A group is its prompt once and G completions. Linear layers run on the packed tokens; attention is
causal within the prompt, and each completion attends to [prompt, itself]:

    packed tokens of one prompt   | p0 p1 .. pS-1 | c0 .. cC-1 | c0 .. cC-1 | ...   (S + G*C)
    completion g sees             | x  x  ..  x   |  (others)  | causal     |

Aggregation is the weight array of `objective.token_weights`: the loss is sum(weights * per-token
loss), so micro-batches and devices only change the order of an addition. Statistics of the tokens
(`TOKEN_MEANS`) leave the device as plain sums beside the number of trained tokens, which add up in
the same way: whatever the aggregation, a fraction is a fraction of tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from speciarl_jax.devices.layout import (
    AnyArray,
    Params,
    param_shardings,
)
from speciarl_jax.learner.logprobs import (
    LossConfig,
    TrainBatch,
    pin_to_prompts,
    token_logprobs,
    tree_hidden,
)
from speciarl_jax.learner.opening import optim_shardings
from speciarl_jax.learner.optimizer import OptimState, apply_gradients
from speciarl_jax.objective import loss as losses
from speciarl_jax.policy.model import Policy

# Statistics that are means over the trained tokens.
TOKEN_MEANS = ("clip_low_frac", "clip_high_frac", "dual_frac", "entropy", "kl")


def check_train_batch(batch: TrainBatch[AnyArray]) -> None:
    """Refuses arrays that do not fit together; looks at shapes only, so the host can afford it.

    The fields of a registered dataclass have no annotated shapes, as tree operations fill them with
    whatever they like: this stands in for them where a batch goes to the device.

    Raises:
        ValueError: a field has another shape than its docstring says.
    """
    tree = batch.tree
    prompts, prompt_len = tree.prompt_tokens.shape
    group, width = tree.completion_tokens.shape[1:]
    shapes = {
        "prompt_lengths": (prompts,),
        "positions": (prompts, 3, prompt_len),
        "next_position": (prompts,),
        "image_rows": (prompts, prompt_len),
        "completion_tokens": (prompts, group, width),
        "weights": (prompts, group, width),
        "advantages": (prompts, group),
        "old_logprobs": (prompts, group, width),
        "ref_logprobs": (prompts, group, width),
        "importance": (prompts, group, width),
    }
    for name, expected in shapes.items():
        array = getattr(tree if hasattr(tree, name) else batch, name)
        if array is not None and array.shape != expected:
            raise ValueError(
                f"TrainBatch.{name}: shape {array.shape}, expected {expected} beside prompts "
                f"{tree.prompt_tokens.shape} and completions {tree.completion_tokens.shape}"
            )
    for array in jax.tree.leaves(tree.images):
        if len(array) != prompts:
            raise ValueError(
                f"TrainBatch.images: {len(array)} rows, expected one for each of {prompts} prompts"
            )


def batch_loss(
    policy: Policy, batch: TrainBatch, banned: Array, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of one micro-batch and its additive statistics.

    Returns:
        (sum of weights * per-token loss, statistics): ``logprobs`` [P, G, C]; every other entry
        adds up over micro-batches: ``loss``; ``tokens``, how many are trained (weight above 0);
        and the `TOKEN_MEANS` as sums over those tokens, for `step_statistics` to divide.
    """
    tree = batch.tree
    hidden = tree_hidden(policy, tree, config)
    logprobs, entropy = token_logprobs(policy.text, hidden, tree.completion_tokens, banned, config)
    weights, mask = batch.weights, batch.weights > 0
    stats = {
        "logprobs": logprobs,
        "tokens": _sum_trained(jnp.ones_like(weights), mask),
        "entropy": _sum_trained(entropy, mask),
    }
    if config.objective == "sft":
        per_token = losses.sft_loss(logprobs)
    else:
        per_token = _policy_objective(logprobs, batch, mask, config, stats)
    if config.entropy_coef:
        per_token = per_token - config.entropy_coef * entropy
    total = jnp.sum(jnp.where(mask, weights * per_token, 0.0))
    stats["loss"] = total
    return total, stats


def _policy_objective(
    logprobs: Array, batch: TrainBatch, mask: Array, config: LossConfig, stats: dict[str, Array]
) -> Float[Array, "P G C"]:
    old = batch.old_logprobs
    if old is None:
        old = jax.lax.stop_gradient(logprobs)
    clips = (config.clip_eps_low, config.clip_eps_high, config.clip_dual)
    if config.objective == "gspo":
        per_token, clipped = losses.gspo_loss(logprobs, old, batch.advantages, mask, *clips)
    else:
        per_token, clipped = losses.policy_loss(logprobs, old, batch.advantages, *clips, mask=mask)
    if batch.importance is not None:
        per_token = per_token * batch.importance
    for name in ("clip_low", "clip_high", "dual"):
        stats[f"{name}_frac"] = _sum_trained(getattr(clipped, name), mask)
    if config.kl_coef:
        assert batch.ref_logprobs is not None, "kl_coef needs ref_logprobs"
        kl = losses.k3_kl(logprobs, batch.ref_logprobs, mask=mask)
        stats["kl"] = _sum_trained(kl, mask)
        per_token = per_token + config.kl_coef * kl
    return per_token


def _sum_trained(values: Array, mask: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, values, 0), dtype=jnp.float32)


def step_statistics(updates: Sequence[Mapping[str, AnyArray | float]]) -> dict[str, float]:
    """What `update_step` says of each update of a step, as one row of ``policy/*``.

    Args:
        updates: of each update, scalars on the host: sums as from `batch_loss`, ``grad_norm``.

    Returns:
        The `TOKEN_MEANS` that are there as means over the trained tokens of all updates, nan
        without any token; everything else as a mean over the updates.
    """
    tokens = sum(float(update["tokens"]) for update in updates)
    statistics = {}
    for name in [name for name in updates[0] if name != "tokens"]:
        values = np.array([update[name] for update in updates], np.float64)
        if name in TOKEN_MEANS:
            statistics[name] = float(values.sum() / tokens) if tokens else math.nan
        else:
            statistics[name] = float(values.mean())
    return statistics


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "config", "optimizer"),
    donate_argnames=("trainable", "optim_state"),
)
def update_step(
    graphdef: nnx.GraphDef[Policy],
    trainable: Params,
    frozen: Params,
    optim_state: OptimState,
    batch: TrainBatch,
    banned: Array,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
) -> tuple[Params, OptimState, dict[str, Array]]:
    """One optimiser step over a mini-batch cut into micro-batches.

    Args:
        graphdef: the policy's structure.
        trainable: adapter (or chosen base weights); donated.
        frozen: the rest; neither differentiated nor donated.
        optim_state: donated.
        batch: leaves [U, P, ...]; gradients add up over the U micro-batches by scan.
        banned: ids outside the sampler's vocabulary.
        optimizer: from `optimizer.make_optimizer`; static.
        config: static part of the loss.

    Returns:
        (trainable, optimiser state, statistics): the sums of `batch_loss` over the mini-batch,
        ``grad_norm``, ``logprobs`` [U, P, G, C].
    """

    def micro_loss(trainable: Params, micro: TrainBatch) -> tuple[Array, dict[str, Array]]:
        return batch_loss(nnx.merge(graphdef, trainable, frozen), micro, banned, config)

    def accumulate(grads: Params, micro: TrainBatch) -> tuple[Params, dict[str, Array]]:
        (_, stats), new = jax.value_and_grad(micro_loss, has_aux=True)(trainable, micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), stats

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    grads, stats = jax.lax.scan(accumulate, zeros, batch)
    logprobs = pin_to_prompts(stats.pop("logprobs"), config)
    stats = {"logprobs": logprobs, **{k: jnp.sum(v, axis=0) for k, v in stats.items()}}
    trainable, optim_state, norm = apply_gradients(
        optimizer, grads, optim_state, trainable, stats["tokens"]
    )
    if config.mesh is not None:
        trainable, optim_state = lay_out(trainable, optim_state, optimizer, config.mesh)
    return trainable, optim_state, {**stats, "grad_norm": norm}


def lay_out(
    trainable: Params,
    optim_state: OptimState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[Params, OptimState]:
    """Pins the training state to its places, so that a step gives back the layout it was given."""
    places = (
        param_shardings(trainable, mesh),
        optim_shardings(optimizer, optim_state, trainable, mesh),
    )
    laid_out: tuple[Params, OptimState] = jax.lax.with_sharding_constraint(
        (trainable, optim_state), places
    )
    return laid_out
