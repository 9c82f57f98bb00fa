"""The update: log-probs on the shared-prefix tree, loss, accumulated gradients, one optimiser step.

A group is its prompt once and G completions. Linear layers run on the packed tokens; attention is
causal within the prompt, and each completion attends to [prompt, itself]:

    packed tokens of one prompt   | p0 p1 .. pS-1 | c0 .. cC-1 | c0 .. cC-1 | ...   (S + G*C)
    completion g sees             | x  x  ..  x   |  (others)  | causal     |

Aggregation is the weight array of `speciarl_jax.weights`: the loss is sum(weights * per-token
loss), so micro-batches and devices only change the order of an addition.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from speciarl_jax import loss as losses
from speciarl_jax.optim import OptimState, apply_gradients
from speciarl_jax.policy.flash import attend_causal, attend_group
from speciarl_jax.policy.layers import last_axis
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.text import TextModel
from speciarl_jax.rollout.sampling import allowed_logits
from speciarl_jax.sharding import (
    num_replicas,
    optimizer_shardings,
    param_shardings,
    prompt_sharding,
    replicated,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Device arrays of P groups. Padding groups and tokens have weight 0.

    Attributes:
        tokens: [P, S] prompt tokens, left-aligned.
        prompt_lengths: [P].
        positions: [P, 3, S] M-RoPE ids.
        next_position: [P] M-RoPE id of completion token 0.
        image_rows: [P, S] row in the prompt's own table of merged tokens, -1 for text.
        images: [P, M, D] encoded images; or (patches, positions, mask) with leading axis P when
            the vision tower is trained.
        completions: [P, G, C] tokens, stop token included.
        weights: [P, G, C] float32 aggregation weights, 0 where nothing is trained.
        advantages: [P, G].
        old_logprobs: [P, G, C] of the parameters at rollout; None: this update's own (on-policy).
        ref_logprobs: [P, G, C] of the adapter-off policy; None without KL.
        importance: [P, G, C] truncated importance weights; None for 1.
    """

    tokens: Array
    prompt_lengths: Array
    positions: Array
    next_position: Array
    image_rows: Array
    images: Any
    completions: Array
    weights: Array
    advantages: Array
    old_logprobs: Array | None = None
    ref_logprobs: Array | None = None
    importance: Array | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static part of the loss; hashable. Fields as in `config.AlgoConfig`."""

    objective: str = "policy"  # policy, gspo or sft
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    clip_dual: float = 3.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    temperature: float = 1.0
    remat: str = "none"
    logprob_chunk_tokens: int = 1024
    train_vision: bool = False
    mesh: Mesh | None = None  # None: one device, nothing to lay out


def tree_hidden(policy: Policy, batch: TrainBatch, config: LossConfig) -> Float[Array, "P G C D"]:
    """States that predict each completion token, from one pass over the shared-prefix tree.

    Returns:
        hidden[p, g, c] predicts completions[p, g, c]: the last prompt state for c = 0, the state of
        token c - 1 otherwise.
    """
    text = policy.text
    num_prompts, prompt_len = batch.tokens.shape
    _, group, width = batch.completions.shape
    prompt = _prompt_embeds(policy, batch, config)
    completion = text.embed(batch.completions.reshape(num_prompts, group * width))
    hidden = jnp.concatenate([prompt, completion], axis=1)  # [P, S + G*C, D]

    column = jnp.tile(jnp.arange(width), group)
    own_positions = batch.next_position[:, None] + column[None]  # [P, G*C]
    own_positions = jnp.broadcast_to(own_positions[:, None], (num_prompts, 3, group * width))
    positions = jnp.concatenate([batch.positions, own_positions], axis=2)
    attend_fn = _tree_attention(batch.prompt_lengths, prompt_len, group, width, config.mesh)
    hidden, _, _ = text.run(hidden, positions, attend_fn, remat=config.remat)

    last = jnp.maximum(batch.prompt_lengths - 1, 0)[:, None, None]
    last_prompt = jnp.take_along_axis(hidden[:, :prompt_len], last, axis=1)  # [P, 1, D]
    own = hidden[:, prompt_len:].reshape(num_prompts, group, width, -1)
    first = jnp.broadcast_to(last_prompt[:, None], (num_prompts, group, 1, hidden.shape[-1]))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


def _prompt_embeds(policy: Policy, batch: TrainBatch, config: LossConfig) -> Float[Array, "P S D"]:
    """Each prompt takes image tokens from its own images, so nothing crosses replicas."""
    images = batch.images
    if config.train_vision:
        merged = policy.encode(*images, remat=config.remat, mesh=config.mesh)
        images = merged.reshape(batch.tokens.shape[0], -1, merged.shape[-1])
    rows = batch.image_rows[..., None]
    hidden = policy.text.embed(batch.tokens)
    from_image = jnp.take_along_axis(images, jnp.maximum(rows, 0), axis=1)
    return jnp.where(rows >= 0, from_image.astype(hidden.dtype), hidden)


def _tree_attention(
    lengths: Int[Array, " P"], prompt_len: int, group: int, width: int, mesh: Mesh | None
) -> Any:
    sees_prompt = jnp.arange(prompt_len)[None] < lengths[:, None]  # [P, S]

    def attend_fn(q: Array, k: Array, v: Array, layer: Array, carry: None) -> Any:
        prompt = [x[:, :prompt_len] for x in (q, k, v)]
        own = [x[:, prompt_len:].reshape(x.shape[0], group, width, *x.shape[2:]) for x in (q, k, v)]
        out_prompt = attend_causal(*prompt, lengths, mesh)
        out_own = attend_group(*own, *prompt[1:], sees_prompt, mesh)
        out_own = out_own.reshape(q[:, prompt_len:].shape)
        return jnp.concatenate([out_prompt, out_own], axis=1), carry, None

    return attend_fn


def token_logprobs(
    text: TextModel,
    hidden: Float[Array, "P G C D"],
    tokens: Int[Array, "P G C"],
    banned: Array,
    config: LossConfig,
) -> tuple[Float[Array, "P G C"], Float[Array, "P G C"]]:
    """Log-prob of each token and entropy of its distribution, in float32, chunk by chunk.

    At most `logprob_chunk_tokens` rows of logits [., V] exist at once on a replica, in the backward
    pass too. A chunk takes the same columns of every prompt, so that it is spread like the prompts.

    Args:
        text: gives the head.
        hidden: states from `tree_hidden`.
        tokens: what was sampled.
        banned: ids outside the sampler's vocabulary, removed here as there.
        config: temperature and chunk size.
    """
    prompts, count = tokens.shape[0], tokens.shape[1] * tokens.shape[2]
    replicas = num_replicas(config.mesh) if config.mesh else 1
    width = min(max(config.logprob_chunk_tokens * replicas // prompts, 1), count)  # of a chunk

    def split(x: Array) -> Array:  # [P, G, C, ...] -> [chunks, P, width, ...]
        flat = x.reshape(prompts, count, *x.shape[3:])
        flat = jnp.pad(flat, ((0, 0), (0, -count % width)) + ((0, 0),) * (flat.ndim - 2))
        return jnp.moveaxis(flat.reshape(prompts, -1, width, *x.shape[3:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(prompts, -1)[:, :count].reshape(tokens.shape)

    @jax.checkpoint
    def chunk_logprobs(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logits = allowed_logits(text.logits(hidden), banned, config.temperature)
        if config.entropy_coef:
            return _logprob_and_entropy(logits, tokens, banned)
        return _logprob_and_metric(logits, tokens, banned)

    chunks = (split(hidden), split(tokens))
    logprobs, entropy = jax.lax.map(lambda xs: chunk_logprobs(*xs), chunks)
    return join(logprobs), join(entropy)


def _logprob_and_entropy(logits: Array, tokens: Array, banned: Array) -> tuple[Array, Array]:
    """Of logits [..., V] and one token each."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_total = jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True))
    logprobs = (logits - peak) - log_total
    chosen = jnp.sum(jnp.where(_is_chosen(logits, tokens), logprobs, 0.0), axis=-1)
    plogp = jnp.exp(logprobs) * jnp.where(last_axis(banned, logprobs), 0.0, logprobs)
    return chosen, -jnp.sum(plogp, axis=-1)


@jax.custom_vjp
def _logprob_and_metric(logits: Array, tokens: Array, banned: Array) -> tuple[Array, Array]:
    """`_logprob_and_entropy` with the entropy as a metric, without gradient.

    d logprob / d logits = onehot - softmax is one pass over the logits. Derived automatically it is
    several arrays of their size, for the entropy's zero gradient too.
    """
    return _logprob_and_entropy(logits, tokens, banned)


def _is_chosen(logits: Array, tokens: Array) -> Array:
    return last_axis(jnp.arange(logits.shape[-1]), logits) == tokens[..., None]


def _metric_forward(
    logits: Array, tokens: Array, banned: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return _logprob_and_metric(logits, tokens, banned), (logits, log_total, tokens)


def _metric_backward(
    residuals: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, None, None]:
    logits, log_total, tokens = residuals
    probs = jnp.exp(logits - log_total)
    return cotangents[0][..., None] * (_is_chosen(logits, tokens) - probs), None, None


_logprob_and_metric.defvjp(_metric_forward, _metric_backward)


def batch_loss(
    policy: Policy, batch: TrainBatch, banned: Array, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of one micro-batch and its additive statistics.

    Returns:
        (sum of weights * per-token loss, statistics): ``logprobs`` [P, G, C]; every other entry is
        already multiplied by the weights, so micro-batches add up to the mini-batch's value.
    """
    hidden = tree_hidden(policy, batch, config)
    logprobs, entropy = token_logprobs(policy.text, hidden, batch.completions, banned, config)
    weights, mask = batch.weights, batch.weights > 0
    stats = {"logprobs": logprobs, "entropy": jnp.sum(weights * entropy)}
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
        stats[name] = jnp.sum(jnp.where(getattr(clipped, name) & mask, batch.weights, 0.0))
    if config.kl_coef:
        kl = losses.k3_kl(logprobs, batch.ref_logprobs, mask=mask)
        stats["kl"] = jnp.sum(batch.weights * kl)
        per_token = per_token + config.kl_coef * kl
    return per_token


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def batch_logprobs(
    graphdef: nnx.GraphDef, states: tuple, batch: TrainBatch, banned: Array, config: LossConfig
) -> Float[Array, "U P G C"]:
    """Log-probs of sampled tokens under a policy or the reference, micro-batch by micro-batch.

    Args:
        graphdef: structure with or without the adapter.
        states: what it merges with.
        batch: leaves [U, P, ...], U micro-batches.
        banned: ids outside the sampler's vocabulary.
        config: temperature, chunk size.
    """

    def one(micro: TrainBatch) -> Array:
        policy = nnx.merge(graphdef, *states)
        hidden = tree_hidden(policy, micro, config)
        return token_logprobs(policy.text, hidden, micro.completions, banned, config)[0]

    return _spread(jax.lax.map(one, batch), config)


def _spread(logprobs: Float[Array, "U P G C"], config: LossConfig) -> Float[Array, "U P G C"]:
    """Pins log-probs to the replicas of their prompts."""
    if config.mesh is None:
        return logprobs
    return jax.lax.with_sharding_constraint(logprobs, prompt_sharding(config.mesh, axis=1))


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "config", "optimizer"),
    donate_argnames=("trainable", "optim_state"),
)
def update_step(
    graphdef: nnx.GraphDef,
    trainable: nnx.State,
    frozen: nnx.State,
    optim_state: OptimState,
    batch: TrainBatch,
    banned: Array,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
) -> tuple[nnx.State, OptimState, dict[str, Array]]:
    """One optimiser step over a mini-batch cut into micro-batches.

    Args:
        graphdef: the policy's structure.
        trainable: adapter (or chosen base weights); donated.
        frozen: the rest; neither differentiated nor donated.
        optim_state: donated.
        batch: leaves [U, P, ...]; gradients add up over the U micro-batches by scan.
        banned: ids outside the sampler's vocabulary.
        optimizer: from `optim.make_optimizer`; static.
        config: static part of the loss.

    Returns:
        (trainable, optimiser state, statistics): sums over the mini-batch, ``grad_norm``,
        ``logprobs`` [U, P, G, C].
    """

    def micro_loss(trainable: nnx.State, micro: TrainBatch) -> tuple[Array, dict[str, Array]]:
        return batch_loss(nnx.merge(graphdef, trainable, frozen), micro, banned, config)

    def accumulate(grads: nnx.State, micro: TrainBatch) -> tuple[nnx.State, dict[str, Array]]:
        (_, stats), new = jax.value_and_grad(micro_loss, has_aux=True)(trainable, micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), stats

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    grads, stats = jax.lax.scan(accumulate, zeros, batch)
    logprobs = _spread(stats.pop("logprobs"), config)
    stats = {"logprobs": logprobs, **{k: jnp.sum(v, axis=0) for k, v in stats.items()}}
    trainable, optim_state, norm = apply_gradients(optimizer, grads, optim_state, trainable)
    if config.mesh is not None:
        trainable, optim_state = lay_out(trainable, optim_state, optimizer, config.mesh)
    return trainable, optim_state, {**stats, "grad_norm": norm}


def lay_out(
    trainable: nnx.State,
    optim_state: OptimState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[nnx.State, OptimState]:
    """Pins the training state to its places, so that a step gives back the layout it was given."""
    shardings = param_shardings(trainable, mesh)
    places = OptimState(
        optimizer_shardings(optimizer, optim_state.inner, shardings, mesh),
        replicated(mesh),
        replicated(mesh),
    )
    return jax.lax.with_sharding_constraint((trainable, optim_state), (shardings, places))
