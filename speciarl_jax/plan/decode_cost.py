"""What decoding costs: the sizes that a rollout passes through, and a step at each of them.

The schedule is the engine's: chunks end at their length or when the rows of the fullest shard fit
the next smaller batch, columns double, and what exceeds the limit waits on the host. Lengths are
dealt to shards at random with a fixed seed, so waiting for the fullest is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.plan.chips import Chip
from speciarl_jax.plan.measure import Traffic
from speciarl_jax.rollout import layout

_SEED = 0


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One decode step on one device.

    Attributes:
        num_bytes: read and written in its memory.
        wire_bytes: that it sends.
        hops: of its transfers, one after the other.
        around: bytes that a call of the program copies before and after its steps.
    """

    num_bytes: float
    wire_bytes: float
    hops: float
    around: float


@runtime_checkable
class Cost(Protocol):
    """Cost of a step by the rows of a shard and the columns of their caches."""

    def at(self, rows: int, columns: int) -> StepCost:
        """At these sizes."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """What must move, counted by hand: weights, prompts and rows once, sums over `tensor`.

    Attributes:
        fixed: bytes of weights and prompts.
        token: bytes of one token of one row in the caches.
        fixed_wire, row_wire: bytes that a device sends in any case, and for a row.
    """

    fixed: float
    token: float
    fixed_wire: float
    row_wire: float

    def at(self, rows: int, columns: int) -> StepCost:
        """At these sizes."""
        wire = self.fixed_wire + self.row_wire * rows
        return StepCost(self.fixed + self.token * rows * columns, wire, 0, 0)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiled programs move, between their sizes: a + b rows + c rows columns.

    Attributes:
        points: (rows, columns, traffic) of three programs or more.
    """

    points: tuple[tuple[int, int, Traffic], ...]

    def at(self, rows: int, columns: int) -> StepCost:
        """At these sizes; no program costs less than nothing."""
        sizes = np.array([(1, r, r * c) for r, c, _ in self.points], float)
        scale = sizes.max(axis=0)  # the sizes differ by powers of ten
        place = np.array([1, rows, rows * columns]) / scale

        def between(values: Sequence[float]) -> float:
            terms = np.linalg.lstsq(sizes / scale, np.array(values, float), rcond=None)[0]
            return max(float(place @ terms), 0.0)

        found = [traffic for _, _, traffic in self.points]
        return StepCost(
            between([one.loop_bytes for one in found]),
            between([one.loop_wire for one in found]),
            between([one.loop_hops for one in found]),
            between([one.around for one in found]),
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the decode program: `steps` at a size.

    Attributes:
        moved: rows x columns that are read and written to reach the next size.
    """

    rows: int
    columns: int
    steps: int
    moved: int = 0


@dataclasses.dataclass(frozen=True)
class Decoding:
    """All calls of a step, on one device.

    Attributes:
        num_steps, num_calls: of the decode program, all waves together.
        device_bytes, wire_bytes: as in `plan.work.Work`.
        seconds: roofline.
    """

    num_steps: int
    num_calls: int
    device_bytes: float
    wire_bytes: float
    seconds: float


def deal(
    lengths: Int[np.ndarray, "P G"], num_shards: int, wave_rows: int
) -> Int[np.ndarray, "waves shards rows"]:
    """Lengths of the rows of each wave and shard; where rows are missing there is length 0."""
    mixed = np.random.default_rng(_SEED).permutation(lengths.reshape(-1))
    per_shard = -(-mixed.size // num_shards)
    waves = -(-per_shard // wave_rows)
    dealt = np.pad(mixed, (0, per_shard * num_shards - mixed.size)).reshape(num_shards, -1)
    dealt = np.pad(dealt, ((0, 0), (0, waves * wave_rows - per_shard)))
    return dealt.reshape(num_shards, waves, wave_rows).transpose(1, 0, 2)


def schedule(lengths: Int[np.ndarray, "shards rows"], config: RolloutConfig) -> Iterator[Call]:
    """The calls of one wave."""
    full = rows = lengths.shape[1]
    sizes = layout.column_sizes(config.chunk_tokens, config.max_completion_tokens, config.compact)
    live = (lengths[:, :, None] > np.arange(sizes[-1] + 1)).sum(axis=1).max(axis=0)  # [steps]
    step = place = 0
    while live[step]:
        columns = sizes[place]
        until = min(step + config.chunk_tokens, columns)
        smaller = layout.next_rows(rows, full) if config.compact else 0
        steps = range(step + 1, until)
        end = next((t for t in steps if live[t] <= smaller), until) if config.early_exit else until
        call, step, moved = Call(rows, columns, end - step), end, 0
        while config.compact and live[step] and live[step] <= layout.next_rows(rows, full):
            smaller = layout.next_rows(rows, full)
            moved += (rows + smaller) * columns
            rows = smaller
        if live[step] and step == columns:
            place += 1
            moved += rows * (columns + sizes[place])
        yield dataclasses.replace(call, moved=moved)


def price(
    calls: Sequence[Call], cost: Cost, token_bytes: float, flops_of_row: float, chip: Chip
) -> Decoding:
    """Roofline of the calls: a step takes what its FLOPs or bytes take, then its transfers.

    Args:
        calls: from `schedule`.
        cost: of a step.
        token_bytes: of one token of one row in the caches.
        flops_of_row: of one token on one device.
        chip: the device.
    """
    device_bytes = wire_bytes = seconds = 0.0
    for call in calls:
        step = cost.at(call.rows, call.columns)
        moved = 2 * step.around + call.moved * token_bytes
        compute_s = call.rows * flops_of_row / chip.peak
        step_s = max(compute_s, step.num_bytes / chip.bytes_per_s)
        step_s += step.wire_bytes / chip.wire_bytes_per_s + step.hops * chip.hop_s
        seconds += call.steps * step_s + moved / chip.bytes_per_s
        device_bytes += call.steps * step.num_bytes + moved
        wire_bytes += call.steps * step.wire_bytes
    steps = sum(call.steps for call in calls)
    return Decoding(steps, len(calls), device_bytes, wire_bytes, seconds)
