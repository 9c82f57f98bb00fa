"""Groups into micro-batches of similar completion length, within a budget of padded tokens.

A group costs S + G*C tokens, its prompt once and G completions, each padded to the longest of the
micro-batch it sits in. Fixed micro-batches pad every group to the longest of the whole step. Here
groups are sorted by their longest completion and cut into micro-batches whose padded size stays
within ``train.micro_batch_tokens``:

    fixed    | ppp ccccc...... |      packed   | ppp ccccc.|     3 prompts of one shape
             | ppp ccccccccccc |               | ppp ccccc.|
             | ppp cc......... |               | ppp cc....|
             | ppp cccc....... |               | ppp ccccccccccc |     1 of another

C comes from a ladder of steps of about a quarter and S is the step's, so that few programs are
compiled. What padding is left is mostly within groups: the longest of N answers is well above their
mean. The weights of `objective.token_weights` are those of the whole mini-batch, so the loss is the
same sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from speciarl_jax.devices.layout import AnyArray, Params, own_prompts, place_prompts
from speciarl_jax.learner import update
from speciarl_jax.learner.batches import bucket_tokens
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch, TreeBatch, batch_logprobs
from speciarl_jax.learner.optimizer import OptimState, apply_gradients
from speciarl_jax.learner.update import batch_loss
from speciarl_jax.policy.model import Policy

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Pack:
    """One micro-batch.

    Attributes:
        rows: [n] groups in it, -1 for padding; each replica has an equal consecutive part.
        prompt_tokens: S, padded prompt length.
        completion_tokens: C, padded completion length.
    """

    rows: np.ndarray
    prompt_tokens: int
    completion_tokens: int

    def padded_tokens(self, group_size: int) -> int:
        """Tokens that the device computes."""
        return len(self.rows) * (self.prompt_tokens + group_size * self.completion_tokens)


def pack_groups(
    lengths: np.ndarray,
    prompt_tokens: int,
    limit: int,
    budget_tokens: int,
    num_replicas: int = 1,
) -> list[list[Pack]]:
    """Cuts a mini-batch into micro-batches.

    A group stays in the process that sampled it. All processes take part in every micro-batch, so
    its shape follows the longest that any of them has left.

    Args:
        lengths: [H, P, G] completion tokens of H processes.
        prompt_tokens: S, padded prompt length of the step.
        limit: padded completion length of the step.
        budget_tokens: padded tokens that a replica may hold at once.
        num_replicas: D of a process; every micro-batch has a multiple of D of its prompts, dealt
            so that the real tokens of the replicas are as equal as a greedy deal makes them.

    Returns:
        For each process its parts of the micro-batches, as many and of the same shapes in all, the
        longest completions first; each group is in exactly one.

    Raises:
        ValueError: one group alone is larger than the budget.
    """
    group_size = lengths.shape[2]
    longest = lengths.max(axis=2)  # [H, P]
    orders = [np.argsort(-row, kind="stable") for row in longest]
    packs: list[list[Pack]] = [[] for _ in orders]
    while any(len(order) for order in orders):
        left = [
            int(row[order[0]]) for row, order in zip(longest, orders, strict=True) if len(order)
        ]
        width = bucket_tokens(max(left), limit)
        size = prompt_tokens + group_size * width
        if size > budget_tokens:
            raise ValueError(
                f"train.micro_batch_tokens={budget_tokens}: one group takes {size} padded tokens; "
                "set it to at least that"
            )
        count = budget_tokens // size * num_replicas
        for process, order in enumerate(orders):
            rows = _deal(order[:count], lengths[process].sum(axis=1), count, num_replicas)
            packs[process].append(Pack(rows, prompt_tokens, width))
            orders[process] = order[count:]
    return packs


def _deal(members: np.ndarray, real: np.ndarray, count: int, num_replicas: int) -> np.ndarray:
    """[count] rows, -1 filled: the largest group goes to the replica with the fewest tokens."""
    hands: list[list[int]] = [[] for _ in range(num_replicas)]
    totals = np.zeros(num_replicas)
    for row in members[np.argsort(-real[members], kind="stable")].tolist():
        open_hands = [d for d in range(num_replicas) if len(hands[d]) < count // num_replicas]
        hand = min(open_hands, key=lambda d: (totals[d], d))
        hands[hand].append(row)
        totals[hand] += real[row]
    size = count // num_replicas
    return np.array([row for hand in hands for row in hand + [-1] * (size - len(hand))])


def cut_tree(tree: TreeBatch[AnyArray], pack: Pack) -> TreeBatch[AnyArray]:
    """The groups of a micro-batch, leaves [n, ...]; padding repeats the first group."""
    own: TreeBatch[AnyArray] = jax.tree.map(lambda x: _take(x, pack), tree)
    prompt, width = pack.prompt_tokens, pack.completion_tokens
    return dataclasses.replace(
        own,
        prompt_tokens=own.prompt_tokens[:, :prompt],
        positions=own.positions[:, :, :prompt],
        image_rows=own.image_rows[:, :prompt],
        completion_tokens=own.completion_tokens[:, :, :width],
    )


def cut_pack(batch: TrainBatch[AnyArray], pack: Pack) -> TrainBatch[AnyArray]:
    """The groups of a micro-batch, leaves [n, ...]; padding rows have weight 0."""
    is_real = (pack.rows >= 0)[:, None, None].astype(np.float32)

    def per_token(x: AnyArray | None) -> AnyArray | None:
        return None if x is None else _take_tokens(x, pack)

    return TrainBatch[AnyArray](
        tree=cut_tree(batch.tree, pack),
        weights=_take_tokens(batch.weights, pack) * is_real,
        advantages=_take(batch.advantages, pack),
        old_logprobs=per_token(batch.old_logprobs),
        ref_logprobs=per_token(batch.ref_logprobs),
        importance=per_token(batch.importance),
    )


def _take(x: AnyArray, pack: Pack) -> AnyArray:
    """Rows of a host or device array, on its side."""
    rows = np.maximum(pack.rows, 0)
    return x[rows] if isinstance(x, np.ndarray) else jnp.take(x, rows, axis=0)


def _take_tokens(x: AnyArray, pack: Pack) -> AnyArray:
    return _take(x, pack)[:, :, : pack.completion_tokens]


def _place(micro: Batch, config: LossConfig, axis: int = 0) -> Batch:
    return micro if config.mesh is None else place_prompts(micro, config.mesh, axis)


def unpack(parts: Sequence[AnyArray], packs: Sequence[Pack], like: AnyArray) -> Array:
    """Per-token results [n, G, C] of micro-batches in the order of this process's groups.

    The result is [P, G, C] as `like`, 0 past a micro-batch's own C.
    """
    rows = np.concatenate([pack.rows for pack in packs])
    wide = [jnp.pad(x, ((0, 0), (0, 0), (0, like.shape[2] - x.shape[2]))) for x in parts]
    place = np.flatnonzero(rows >= 0)
    place = place[np.argsort(rows[place])]
    return jnp.take(jnp.concatenate(wide), place, axis=0)


def packed_logprobs(
    graphdef: nnx.GraphDef[Policy],
    states: tuple[Params, ...],
    tree: TreeBatch[AnyArray],
    packs: Sequence[Pack],
    banned: AnyArray,
    config: LossConfig,
) -> Array:
    """`logprobs.batch_logprobs`, [P, G, C], micro-batch by micro-batch of different shapes."""
    parts = []
    for pack in packs:
        micro = _place(jax.tree.map(lambda x: x[None], cut_tree(tree, pack)), config, axis=1)
        parts.append(batch_logprobs(graphdef, states, micro, banned, config))
    return unpack([own_prompts(x, axis=1)[0] for x in parts], packs, tree.completion_tokens)


def packed_update(
    graphdef: nnx.GraphDef[Policy],
    trainable: Params,
    frozen: Params,
    optim_state: OptimState,
    batch: TrainBatch[AnyArray],
    packs: Sequence[Pack],
    banned: AnyArray,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
) -> tuple[Params, OptimState, dict[str, Array]]:
    """`update.update_step` over micro-batches of different shapes; `trainable` is donated too.

    Of the statistics that it returns ``logprobs`` is [P, G, C].
    """
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32, device=x.sharding), trainable)
    totals: dict[str, Array] = {}
    logprobs = []
    for pack in packs:
        micro = _place(cut_pack(batch, pack), config)
        grads, stats = _accumulate(graphdef, trainable, frozen, grads, micro, banned, config)
        logprobs.append(stats.pop("logprobs"))
        totals = {k: v + totals.get(k, 0.0) for k, v in stats.items()}
    trainable, optim_state, norm = _apply(
        optimizer, grads, optim_state, trainable, totals["tokens"], config
    )
    joined = unpack([own_prompts(x) for x in logprobs], packs, batch.tree.completion_tokens)
    return trainable, optim_state, {**totals, "grad_norm": norm, "logprobs": joined}


@functools.partial(jax.jit, static_argnames=("graphdef", "config"), donate_argnames=("grads",))
def _accumulate(
    graphdef: nnx.GraphDef[Policy],
    trainable: Params,
    frozen: Params,
    grads: Params,
    micro: TrainBatch,
    banned: Array,
    config: LossConfig,
) -> tuple[Params, dict[str, Array]]:
    def micro_loss(trainable: Params) -> tuple[Array, dict[str, Array]]:
        return batch_loss(nnx.merge(graphdef, trainable, frozen), micro, banned, config)

    (_, stats), new = jax.value_and_grad(micro_loss, has_aux=True)(trainable)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new), stats


@functools.partial(
    jax.jit,
    static_argnames=("optimizer", "config"),
    donate_argnames=("optim_state", "trainable"),
)
def _apply(
    optimizer: optax.GradientTransformation,
    grads: Params,
    optim_state: OptimState,
    trainable: Params,
    num_tokens: Array,
    config: LossConfig,
) -> tuple[Params, OptimState, Array]:
    trainable, optim_state, norm = apply_gradients(
        optimizer, grads, optim_state, trainable, num_tokens
    )
    if config.mesh is not None:
        trainable, optim_state = update.lay_out(trainable, optim_state, optimizer, config.mesh)
    return trainable, optim_state, norm
