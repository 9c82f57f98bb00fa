"""Log-probs of sampled tokens on the shared-prefix tree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Generic

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from speciarl_jax.config.schema import Config
from speciarl_jax.devices.layout import Leaf, Params, prompt_sharding
from speciarl_jax.devices.mesh import num_replicas
from speciarl_jax.policy.flash import attend_causal, attend_group
from speciarl_jax.policy.layers import last_axis
from speciarl_jax.policy.model import Policy
from speciarl_jax.policy.rope import text_angles
from speciarl_jax.policy.text import AttendFn, TextModel
from speciarl_jax.policy.vocabulary import allowed_logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeBatch(Generic[Leaf]):
    """P groups as shared-prefix trees: what the log-probs of their answers need.

    Attributes:
        prompt_tokens: [P, S], left-aligned.
        prompt_lengths: [P].
        positions: [P, 3, S] M-RoPE ids of the prompt.
        next_position: [P] M-RoPE id of completion token 0.
        image_rows: [P, S] row in the prompt's own table of merged tokens, -1 for text.
        images: [P, M, D] encoded images; or (patches, positions, mask) with leading axis P when
            the vision tower is trained.
        completion_tokens: [P, G, C], stop token included.
    """

    prompt_tokens: Leaf
    prompt_lengths: Leaf
    positions: Leaf
    next_position: Leaf
    image_rows: Leaf
    images: Leaf | tuple[Leaf, Leaf, Leaf]
    completion_tokens: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch(Generic[Leaf]):
    """P groups with what the loss needs beside their log-probs. Padding has weight 0.

    Attributes:
        tree: prompts and completions.
        weights: [P, G, C] float32 aggregation weights, 0 where nothing is trained.
        advantages: [P, G] float32.
        old_logprobs: [P, G, C] of the parameters at rollout; None: this update's own (on-policy).
        ref_logprobs: [P, G, C] of the adapter-off policy; None without KL.
        importance: [P, G, C] truncated importance weights; None for 1.
    """

    tree: TreeBatch[Leaf]
    weights: Leaf
    advantages: Leaf
    old_logprobs: Leaf | None = None
    ref_logprobs: Leaf | None = None
    importance: Leaf | None = None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static part of the loss; hashable. Fields as in `schema.AlgoConfig`."""

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

    @classmethod
    def of(cls, config: Config, mesh: Mesh | None) -> LossConfig:
        """The loss of a recipe on a mesh."""
        algo = config.algo
        is_named = algo.name in ("sft", "gspo")  # the others differ in advantages and weights only
        return cls(
            objective=algo.name if is_named else "policy",
            clip_eps_low=algo.clip_eps_low,
            clip_eps_high=algo.clip_eps_high,
            clip_dual=algo.clip_dual,
            kl_coef=algo.kl_coef,
            entropy_coef=algo.entropy_coef,
            temperature=1.0 if algo.name == "sft" else config.rollout.temperature,
            remat=config.model.remat,
            logprob_chunk_tokens=config.train.logprob_chunk_tokens,
            train_vision=config.model.train_vision,
            mesh=mesh,
        )


def tree_hidden(policy: Policy, batch: TreeBatch, config: LossConfig) -> Float[Array, "P G C D"]:
    """States that predict each completion token, from one pass over the shared-prefix tree.

    Returns:
        hidden[p, g, c] predicts completion_tokens[p, g, c]: the last prompt state for c = 0, the
        state of token c - 1 otherwise.
    """
    text = policy.text
    num_prompts, prompt_len = batch.prompt_tokens.shape
    _, group, width = batch.completion_tokens.shape
    prompt = _prompt_embeds(policy, batch, config)
    completion = text.embed(batch.completion_tokens.reshape(num_prompts, group * width))
    hidden = jnp.concatenate([prompt, completion], axis=1)  # [P, S + G*C, D]

    column = jnp.tile(jnp.arange(width), group)
    own_positions = batch.next_position[:, None] + column[None]  # [P, G*C]
    own_positions = jnp.broadcast_to(own_positions[:, None], (num_prompts, 3, group * width))
    positions = jnp.concatenate([batch.positions, own_positions], axis=2)
    attend_fn = _tree_attention(batch.prompt_lengths, prompt_len, group, width, config.mesh)
    angles = text_angles(positions, text.arch)
    hidden, _, _ = text.run(hidden, angles, attend_fn, None, remat=config.remat)

    last = jnp.maximum(batch.prompt_lengths - 1, 0)[:, None, None]
    last_prompt = jnp.take_along_axis(hidden[:, :prompt_len], last, axis=1)  # [P, 1, D]
    own = hidden[:, prompt_len:].reshape(num_prompts, group, width, -1)
    first = jnp.broadcast_to(last_prompt[:, None], (num_prompts, group, 1, hidden.shape[-1]))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


def _prompt_embeds(policy: Policy, batch: TreeBatch, config: LossConfig) -> Float[Array, "P S D"]:
    """Each prompt takes image tokens from its own images, so nothing crosses replicas."""
    images = batch.images
    if config.train_vision:
        assert isinstance(images, tuple), "to train the tower takes (patches, positions, mask)"
        merged = policy.encode(*images, config.remat, config.mesh)
        images = merged.reshape(batch.prompt_tokens.shape[0], -1, merged.shape[-1])
    assert not isinstance(images, tuple), "a frozen tower takes encoded images"
    rows = batch.image_rows[..., None]
    hidden = policy.text.embed(batch.prompt_tokens)
    from_image = jnp.take_along_axis(images, jnp.maximum(rows, 0), axis=1)
    return jnp.where(rows >= 0, from_image.astype(hidden.dtype), hidden)


def _tree_attention(
    lengths: Int[Array, " P"], prompt_len: int, group: int, width: int, mesh: Mesh | None
) -> AttendFn[None, None]:
    sees_prompt = jnp.arange(prompt_len)[None] < lengths[:, None]  # [P, S]

    def own(x: Array) -> Array:  # [P, S + G*C, ...] -> [P, G, C, ...]
        return x[:, prompt_len:].reshape(x.shape[0], group, width, *x.shape[2:])

    def attend_fn(
        q: Array, k: Array, v: Array, layer: Array | int, carry: None
    ) -> tuple[Array, None, None]:
        prompt_q, prompt_k, prompt_v = (x[:, :prompt_len] for x in (q, k, v))
        own_q, own_k, own_v = own(q), own(k), own(v)
        out_prompt = attend_causal(prompt_q, prompt_k, prompt_v, lengths, mesh)
        out_own = attend_group(own_q, own_k, own_v, prompt_k, prompt_v, sees_prompt, mesh)
        out_own = out_own.reshape(q[:, prompt_len:].shape)
        return jnp.concatenate([out_prompt, out_own], axis=1), None, None

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
    `hidden` is that of `tree_hidden`; `banned` are ids outside the sampler's vocabulary.
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


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def batch_logprobs(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    batch: TreeBatch,
    banned: Array,
    config: LossConfig,
) -> Float[Array, "U P G C"]:
    """Log-probs of sampled tokens, micro-batch by micro-batch; leaves of `batch` are [U, P, ...].

    `graphdef` and `states` are those of the policy, or without the adapter of the reference.
    """

    def one(micro: TreeBatch) -> Array:
        policy = nnx.merge(graphdef, *states)
        hidden = tree_hidden(policy, micro, config)
        return token_logprobs(policy.text, hidden, micro.completion_tokens, banned, config)[0]

    return pin_to_prompts(jax.lax.map(one, batch), config)


def pin_to_prompts(
    logprobs: Float[Array, "U P G C"], config: LossConfig
) -> Float[Array, "U P G C"]:
    """Pins log-probs to the replicas of their prompts."""
    if config.mesh is None:
        return logprobs
    place = prompt_sharding(config.mesh, axis=1)
    pinned: Array = jax.lax.with_sharding_constraint(logprobs, place)
    return pinned
