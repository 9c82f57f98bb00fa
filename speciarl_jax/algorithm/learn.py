"""The device's half of a step: groups and credit to token weights, loss and optimiser updates.

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
from collections.abc import Sequence

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.algorithm.credit import Credit, check_failed_budget
from speciarl_jax.config.schema import Config, micro_batch_prompts
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.devices import processes
from speciarl_jax.devices.layout import AnyArray, Params, own_prompts, place_prompts
from speciarl_jax.devices.mesh import num_replicas, own_replicas
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.learner import batches, packing
from speciarl_jax.learner.batches import Completions
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch, TreeBatch, batch_logprobs
from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.learner.update import check_train_batch, step_statistics, update_step
from speciarl_jax.objective.loss import importance_weights
from speciarl_jax.objective.token_weights import token_weights
from speciarl_jax.policy.model import Policy
from speciarl_jax.rollout.groups import RolloutBatch
from speciarl_jax.run.session import Session
from speciarl_jax.run.state import TrainState
from speciarl_jax.types import Metrics


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prompts of this process and their answers, padded alike in all; `tree` joins them."""

    batch: PromptBatch
    completions: Completions
    tree: TreeBatch[AnyArray]


@dataclasses.dataclass(frozen=True)
class References:
    """Log-probs of the sampled tokens that the loss compares with; [P, G, C] or None.

    Attributes:
        old: the parameters before this step's updates, trainer's program; None if the step has one
            update on its own rollouts, whose own log-probs they are.
        ref: the policy without its adapter; None without KL.
    """

    old: AnyArray | None = None
    ref: AnyArray | None = None


@dataclasses.dataclass
class Update:
    """Optimiser updates that the device has been given; it may still be at work.

    Attributes:
        trainable, optim: after the updates.
        stats: of each update, on the device.
        logprobs: [P', G, C] of the first mini-batch before its update.
    """

    trainable: Params
    optim: OptimState
    stats: list[dict[str, Array]]
    logprobs: Array


def pad_alike(session: Session, rollouts: RolloutBatch) -> Sequences:
    """Agrees on padded shapes with the other processes: the update is one program of all."""
    limit = session.config.rollout.max_completion_tokens
    batch, embeds = session.agree_shapes(rollouts.batch, rollouts.image_embeds)
    longest = max(len(r.completion_tokens) for group in rollouts.groups for r in group)
    (longest,) = processes.largest(longest)
    completions = batches.pad_completions(rollouts.groups, limit, longest)
    return make_sequences(session, batch, embeds, completions)


def make_sequences(
    session: Session, batch: PromptBatch, embeds: AnyArray | None, completions: Completions
) -> Sequences:
    """Joins prompts and answers padded alike; `embeds` [I*M, D] may be None if the tower trains."""
    table = None if session.config.model.train_vision else embeds
    return Sequences(batch, completions, batches.make_tree(batch, completions, table))


def start_references(session: Session, state: TrainState, sequences: Sequences) -> References:
    """Starts the forward passes that need no labels, while the judge is still at work."""
    config, parts = session.config, session.parts
    run = functools.partial(_logprobs, session, sequences)
    old = ref = None
    if config.needs_old_logprobs:
        old = run(parts.graphdef, state.trainable, parts.frozen)
    if config.algo.kl_coef:
        ref = run(parts.reference_graphdef, parts.frozen)
    return References(old, ref)


def _logprobs(
    session: Session, sequences: Sequences, graphdef: nnx.GraphDef[Policy], *states: Params
) -> AnyArray:
    tree, banned = sequences.tree, session.vocabulary.banned
    settings = LossConfig.of(session.config, session.mesh)
    if session.config.train.micro_batch_tokens:
        packs = mini_batch_packs(session, sequences, slice(None))
        return packing.packed_logprobs(graphdef, states, tree, packs, banned, settings)
    micro = micro_batches(session, tree, slice(None))
    logprobs = batch_logprobs(graphdef, states, micro, banned, settings)
    return batches.join_micro_batches(own_prompts(logprobs, axis=1))


def start_update(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    sequences: Sequences,
    credit: Credit,
    references: References,
) -> Update:
    """Gives the device one optimiser update per mini-batch; does not wait for it.

    `trainable` and `optim` of `state` are donated; `references` are from before the first update.

    Raises:
        TrainingStopped: too many labels are missing to learn from the rest.
    """
    codes = processes.gather_prompts(credit.codes)
    check_failed_budget(session.config, [codes], state.step + 1)
    algo, completions = session.config.algo, sequences.completions
    old, importance = references.old, None
    if algo.importance_cap:
        assert old is not None, "algo.importance_cap needs old log-probs"
        importance = importance_weights(old, completions.rollout_logprobs, algo.importance_cap)
    if algo.old_logprobs == "rollout":
        old = completions.rollout_logprobs
    whole = TrainBatch[AnyArray](
        tree=sequences.tree,
        weights=step_weights(session.config, completions, credit.valid),
        advantages=credit.advantages.astype(np.float32),
        old_logprobs=old,
        ref_logprobs=references.ref,
        importance=importance,
    )
    check_train_batch(whole)
    return _start_updates(session, optimizer, state, sequences, whole)


def _start_updates(
    session: Session,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    sequences: Sequences,
    whole: TrainBatch[AnyArray],
) -> Update:
    """One update per mini-batch, each from where the last one leaves the parameters."""
    config, parts, banned = session.config, session.parts, session.vocabulary.banned
    settings = LossConfig.of(config, session.mesh)
    update = Update(state.trainable, state.optim, [], jax.numpy.zeros(()))
    for rows in mini_batches(config):
        where = (parts.graphdef, update.trainable, parts.frozen, update.optim)
        if config.train.micro_batch_tokens:
            packs = mini_batch_packs(session, sequences, rows)
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
            stats["logprobs"] = batches.join_micro_batches(own)
        logprobs = stats.pop("logprobs")
        update.logprobs = update.logprobs if update.stats else logprobs
        update.stats.append(stats)
    return update


def finish_update(config: Config, state: TrainState, update: Update) -> tuple[TrainState, Metrics]:
    """Waits for the updates of a step.

    Returns:
        (state after the step, ``policy/*``: `update.step_statistics` of its updates).

    Raises:
        TrainingStopped: too many gradients in a row were not finite.
    """
    stats = jax.device_get(update.stats)
    step = state.step + 1
    skipped = int(update.optim.num_skipped_in_row)
    if skipped >= config.optim.max_skipped_updates:
        raise TrainingStopped(
            f"step {step}: {skipped} updates in a row had a gradient that is not finite "
            "(optim.max_skipped_updates); lower optim.learning_rate and resume from a checkpoint"
        )
    metrics: Metrics = {f"policy/{k}": v for k, v in step_statistics(stats).items()}
    after = dataclasses.replace(state, trainable=update.trainable, optim=update.optim, step=step)
    return after, metrics


def check_agreement(config: Config, metrics: Metrics, step: int) -> None:
    """Refuses to go on when sampler and trainer disagree on the sampled tokens at step one.

    Raises:
        TrainingStopped: by more than ``train.mismatch_gate``: in float32 the maximum, in bfloat16
            the mean.
    """
    name = "max" if config.model.compute_dtype == "float32" else "mean"
    gap = metrics[f"mismatch/logprob_{name}_abs"]
    is_within = gap <= config.train.mismatch_gate  # False for NaN
    if step == 1 and not is_within:
        raise TrainingStopped(
            f"step 1: log-probs of sampler and trainer differ by {gap:.2e} ({name}), "
            f"train.mismatch_gate allows {config.train.mismatch_gate:.0e}; rewards would train "
            "the wrong tokens"
        )


def mini_batches(config: Config) -> list[slice]:
    """Rows of each update among this process's prompts of a step."""
    size = config.train.prompts_per_update // processes.num_shares()
    total = config.train.prompts_per_step // processes.num_shares()
    return [slice(start, start + size) for start in range(0, total, size)]


def step_weights(
    config: Config, completions: Completions, valid: Bool[np.ndarray, "P G"]
) -> Float[np.ndarray, "P G C"]:
    """Aggregation weights of a step, mini-batch by mini-batch.

    They know nothing of micro-batches, and count the tokens of all processes.
    """
    algo, tokens = config.algo, completions.completion_tokens
    weights = np.zeros(tokens.shape, np.float32)
    for rows in mini_batches(config):
        lengths = processes.gather(completions.lengths[rows])
        flat = token_weights(
            lengths.reshape(-1),
            processes.gather(valid[rows]).reshape(-1),
            tokens.shape[2],
            algo.aggregation,
            algo.normalization,
            algo.verl_micro_batch,
            algo.verl_ranks,
            loss_norm_tokens=config.rollout.max_completion_tokens,
        )
        weights[rows] = flat.reshape(*lengths.shape, -1)[processes.share_index()]
    return weights


def mini_batch_packs(session: Session, sequences: Sequences, rows: slice) -> Sequence[packing.Pack]:
    """Micro-batches of a mini-batch under ``train.micro_batch_tokens``, rows counted within it."""
    limit = session.config.rollout.max_completion_tokens
    everywhere: Int[np.ndarray, "H P G"] = processes.gather(sequences.completions.lengths)
    return packing.pack_groups(
        everywhere[:, rows],
        sequences.batch.tokens.shape[1],
        batches.bucket_tokens(int(everywhere.max()), limit),
        session.config.train.micro_batch_tokens,
        own_replicas(session.mesh),
    )[processes.share_index()]


def micro_batches(session: Session, whole: batches.Batch, rows: slice) -> batches.Batch:
    """Fixed micro-batches of a mini-batch, [U, P, ...] leaves, spread over the replicas."""
    mesh = session.mesh
    size = micro_batch_prompts(session.config.train, num_replicas(mesh))
    size *= own_replicas(session.mesh)
    micro = batches.micro_batches(whole, rows, size)
    return micro if mesh.size == 1 else place_prompts(micro, mesh, axis=1)
