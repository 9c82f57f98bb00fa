"""The device's half of a step: groups and scores to token weights, loss and optimiser updates.

Three log-probs of the same sampled tokens meet here, and which one divides which is the whole
off-policy correction:

    behaviour   rollout_logprobs: the sampler's program, the parameters that sampled
    proximal    old_logprobs: the trainer's program, the parameters before this step's updates
    current     the trainer's program, the parameters being updated

    algo.old_logprobs="recompute"  loss = min(proximal / behaviour, algo.importance_cap)
                                          * clipped(current / proximal)
    algo.old_logprobs="rollout"    loss = clipped(current / behaviour)

With ``importance_cap=0`` the first factor is 1: right as long as both programs agree (see
``mismatch/*``) and the rollouts are on-policy, so `train.async_steps` refuses it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from speciarl_jax import batching, hosts, packing, weights
from speciarl_jax.checkpoint import TrainState
from speciarl_jax.config import Config, micro_batch_prompts
from speciarl_jax.gather import RolloutBatch
from speciarl_jax.loss import importance_weights
from speciarl_jax.optim import OptimState
from speciarl_jax.scores import Scores, TrainingStopped
from speciarl_jax.session import Session
from speciarl_jax.sharding import num_replicas, own_prompts, place_prompts
from speciarl_jax.types import PromptBatch
from speciarl_jax.update import LossConfig, TrainBatch, batch_logprobs, update_step

Metrics = dict[str, float]


@dataclasses.dataclass
class References:
    """Log-probs of the sampled tokens that the loss compares with; [P, G, C] or None.

    Attributes:
        old: the parameters before this step's updates, trainer's program; None if the step has one
            update on its own rollouts, whose own log-probs they are.
        ref: the policy without its adapter; None without KL.
    """

    old: Array | None
    ref: Array | None


@dataclasses.dataclass
class Update:
    """Optimiser updates that the device has been given; it may still be at work.

    Attributes:
        trainable, optim: after the updates.
        stats: of each update, on the device.
        logprobs: [P', G, C] of the first mini-batch before its update.
    """

    trainable: nnx.State
    optim: OptimState
    stats: list[dict[str, Array]]
    logprobs: Array


def loss_config(session: Session) -> LossConfig:
    """The static part of the loss."""
    config, algo = session.config, session.config.algo
    objectives = {"sft": "sft", "gspo": "gspo"}
    return LossConfig(
        objective=objectives.get(algo.name, "policy"),
        clip_eps_low=algo.clip_eps_low,
        clip_eps_high=algo.clip_eps_high,
        clip_dual=algo.clip_dual,
        kl_coef=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        temperature=1.0 if algo.name == "sft" else config.rollout.temperature,
        remat=config.model.remat,
        logprob_chunk_tokens=config.train.logprob_chunk_tokens,
        train_vision=config.model.train_vision,
        mesh=session.mesh,
    )


def mini_batches(config: Config) -> list[slice]:
    """Rows of each update among this process's prompts of a step."""
    size = config.train.prompts_per_update // jax.process_count()
    total = config.train.prompts_per_step // jax.process_count()
    return [slice(start, start + size) for start in range(0, total, size)]


def update_batch(
    session: Session,
    batch: PromptBatch,
    arrays: batching.GroupArrays,
    scores: Scores | None,
    image_embeds: Array | None,
) -> TrainBatch:
    """The whole rollout batch on device layout; weights per mini-batch."""
    config = session.config
    shape = arrays.lengths.shape
    token_weights = np.zeros((*shape, arrays.tokens.shape[2]), np.float32)
    advantages = np.zeros(shape, np.float32)
    if scores is not None:
        advantages = scores.advantages
        for rows in mini_batches(config):
            token_weights[rows] = mini_batch_weights(config, arrays, scores.valid, rows)
    trained_images = None if config.model.train_vision else image_embeds
    unit = session.arch.vision.merge_unit
    return batching.make_train_batch(batch, arrays, token_weights, advantages, trained_images, unit)


def mini_batch_weights(
    config: Config, arrays: batching.GroupArrays, valid: np.ndarray, rows: slice
) -> np.ndarray:
    """Aggregation weights [P, G, C] of one mini-batch; they do not know of micro-batches.

    What they are divided by counts the tokens of all processes.
    """
    algo = config.algo
    lengths = hosts.gather(arrays.lengths[rows])
    flat = weights.token_weights(
        lengths.reshape(-1),
        hosts.gather(valid[rows]).reshape(-1),
        arrays.tokens.shape[2],
        algo.aggregation,
        algo.normalization,
        algo.verl_micro_batch,
        algo.verl_ranks,
        loss_norm_tokens=config.rollout.max_completion_tokens,
    )
    return flat.reshape(*lengths.shape, -1)[jax.process_index()]


def mini_batch_packs(
    session: Session, batch: PromptBatch | TrainBatch, lengths: np.ndarray, rows: slice
) -> list[packing.Pack]:
    """Micro-batches of a mini-batch under ``train.micro_batch_tokens``, rows counted within it."""
    limit = session.config.rollout.max_completion_tokens
    everywhere = hosts.gather(lengths)
    return packing.pack_groups(
        everywhere[:, rows],
        batch.tokens.shape[1],
        batching.bucket_tokens(int(everywhere.max()), limit),
        session.config.train.micro_batch_tokens,
        num_replicas(session.local),
    )[jax.process_index()]


def micro_batches(session: Session, whole: TrainBatch, rows: slice) -> TrainBatch:
    """Fixed micro-batches of a mini-batch, [U, P, ...] leaves, spread over the replicas."""
    mesh = session.mesh
    size = micro_batch_prompts(session.config.train, num_replicas(mesh))
    size *= num_replicas(session.local)
    micro = batching.micro_batches(whole, rows, size)
    return micro if mesh.size == 1 else place_prompts(micro, mesh, axis=1)


def reference_logprobs(
    session: Session, state: TrainState, rollouts: RolloutBatch, arrays: batching.GroupArrays
) -> References:
    """Starts the forward passes that need no labels, while the judge is still at work."""
    config, parts = session.config, session.parts
    has_several = len(mini_batches(config)) > 1 and config.algo.old_logprobs == "recompute"
    needs_old = has_several or config.algo.importance_cap > 0
    if not needs_old and not config.algo.kl_coef:
        return References(None, None)
    whole = update_batch(session, rollouts.batch, arrays, None, rollouts.image_embeds)
    run = functools.partial(_batch_logprobs, session, whole, arrays.lengths)
    old = run(parts.graphdef, state.trainable, parts.frozen) if needs_old else None
    ref = run(parts.reference_graphdef, parts.frozen) if config.algo.kl_coef else None
    return References(old, ref)


def _batch_logprobs(
    session: Session,
    whole: TrainBatch,
    lengths: np.ndarray,
    graphdef: nnx.GraphDef,
    *states: nnx.State,
) -> Array:
    banned, settings = session.vocabulary.banned, loss_config(session)
    if session.config.train.micro_batch_tokens:
        packs = mini_batch_packs(session, whole, lengths, slice(None))
        return packing.packed_logprobs(graphdef, states, whole, packs, banned, settings)
    micro = micro_batches(session, whole, slice(None))
    logprobs = batch_logprobs(graphdef, states, micro, banned, settings)
    return batching.join_micro_batches(own_prompts(logprobs, axis=1))


def start_update(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rollouts: RolloutBatch,
    arrays: batching.GroupArrays,
    scores: Scores,
    references: References,
) -> Update:
    """Gives the device one optimiser update per mini-batch; does not wait for it.

    `state.trainable` and `state.optim` are donated.
    """
    algo = session.config.algo
    whole = update_batch(session, rollouts.batch, arrays, scores, rollouts.image_embeds)
    whole = dataclasses.replace(whole, ref_logprobs=references.ref, old_logprobs=references.old)
    if algo.importance_cap:
        corrected = importance_weights(references.old, arrays.rollout_logprobs, algo.importance_cap)
        whole = dataclasses.replace(whole, importance=corrected)
    if algo.old_logprobs == "rollout":
        whole = dataclasses.replace(whole, old_logprobs=arrays.rollout_logprobs)
    return start_updates(session, optimizer, state, whole, arrays.lengths)


def start_updates(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    whole: TrainBatch,
    lengths: np.ndarray,
) -> Update:
    """Gives the device the optimiser's updates over the mini-batches of a step.

    Args:
        session: model and recipe.
        optimizer: of `state`.
        state: its `trainable` and `optim` are donated.
        whole: all groups of the step.
        lengths: [P, G] completion tokens.
    """
    config, parts, banned = session.config, session.parts, session.vocabulary.banned
    settings, frozen = loss_config(session), session.parts.frozen
    update = Update(state.trainable, state.optim, [], jax.numpy.zeros(()))
    for rows in mini_batches(config):
        where = (parts.graphdef, update.trainable, frozen, update.optim)
        if config.train.micro_batch_tokens:
            packs = mini_batch_packs(session, whole, lengths, rows)
            mini = jax.tree.map(lambda x, rows=rows: x[rows], whole)
            update.trainable, update.optim, stats = packing.packed_update(
                *where, mini, packs, banned, optimizer, settings
            )
        else:
            micro = micro_batches(session, whole, rows)
            update.trainable, update.optim, stats = update_step(
                *where, micro, banned, optimizer, settings
            )
            own = own_prompts(stats["logprobs"], axis=1)
            stats["logprobs"] = batching.join_micro_batches(own)
        logprobs = stats.pop("logprobs")
        update.logprobs = update.logprobs if update.stats else logprobs
        update.stats.append(stats)
    return update


def finish_update(config: Config, state: TrainState, update: Update) -> tuple[TrainState, Metrics]:
    """Waits for the updates of a step.

    Returns:
        (state after them, ``policy/*`` statistics averaged over the updates).

    Raises:
        TrainingStopped: too many gradients in a row were not finite.
    """
    stats = jax.device_get(update.stats)
    _check_skipped(config, int(update.optim.num_skipped_in_row), state.step + 1)
    metrics = {f"policy/{k}": float(np.mean([s[k] for s in stats])) for k in stats[0]}
    return dataclasses.replace(state, trainable=update.trainable, optim=update.optim), metrics


def _check_skipped(config: Config, skipped: int, step: int) -> None:
    if skipped >= config.optim.max_skipped_updates:
        raise TrainingStopped(
            f"step {step}: {skipped} updates in a row had a gradient that is not finite "
            "(optim.max_skipped_updates); lower optim.learning_rate and resume from a checkpoint"
        )
