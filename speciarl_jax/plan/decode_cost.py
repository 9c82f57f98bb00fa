"""What decoding costs: the sizes that a rollout passes through, and a step at each of them.

The schedule is the engine's: chunks end at their length or when the rows of the fullest shard fit
the next smaller batch, columns double, and what exceeds the limit waits on the host. Lengths are
dealt to shards at random with a fixed seed, so waiting for the fullest is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
        moved: rows x columns that were read and written to reach the size.
        parked: 1 where half of the rows go to the host before anything is decoded.
    """

    rows: int
    columns: int
    steps: int
    moved: int = 0
    parked: int = 0


@dataclasses.dataclass(frozen=True)
class Decoding:
    """All calls of a step, on one device.

    Attributes:
        num_steps, num_calls: of the decode program, all waves together.
        num_parked: halves that wait on the host.
        device_bytes, wire_bytes: as in `plan.work.Work`.
        seconds: roofline.
    """

    num_steps: int
    num_calls: int
    num_parked: int
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


def schedule(
    lengths: Int[np.ndarray, "shards rows"],
    config: RolloutConfig,
    rows_that_fit: Callable[[int], int] | None = None,
    has_few_sizes: bool = False,
) -> Iterator[Call]:
    """The calls of one wave.

    Args:
        lengths: of the rows of each shard.
        config: the recipe's rollout section.
        rows_that_fit: rows of a shard that may have so many columns; None for all of them.
        has_few_sizes: see `rollout.placement`.
    """
    fit = rows_that_fit or (lambda columns: lengths.shape[1])
    start = _Place(lengths.shape[1], lengths.shape[1], 0, 0, has_few_sizes)
    yield from _calls(lengths, config, fit, start)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Rows of a full batch and now, tokens decoded, and the place in the list of columns."""

    full: int
    rows: int
    step: int
    column: int
    has_few_sizes: bool

    def next_rows(self, rows: int) -> int:
        """The size after `rows`; 0 if there is none."""
        return layout.next_rows(rows, self.full, self.has_few_sizes)


def _calls(
    lengths: np.ndarray, config: RolloutConfig, fit: Callable[[int], int], place: _Place
) -> Iterator[Call]:
    limit, has_few = config.max_completion_tokens, place.has_few_sizes
    sizes = layout.column_sizes(config.chunk_tokens, limit, config.compact, has_few)
    live = (lengths[:, :, None] > np.arange(sizes[-1] + 1)).sum(axis=1).max(axis=0)  # [steps]
    rows, step, column = place.rows, place.step, place.column
    moved = 0
    while live[step]:
        while config.compact and live[step] <= (smaller := place.next_rows(rows)):
            moved += (rows + smaller) * sizes[column]
            rows = smaller
        if step == sizes[column]:
            if rows > fit(sizes[column + 1]):
                yield Call(rows, sizes[column], 0, moved + 2 * rows * sizes[column], parked=1)
                for half in _halves(lengths, step, -(-int(live[step]) // 2)):
                    there = dataclasses.replace(place, rows=rows, step=step, column=column)
                    yield from _calls(half, config, fit, there)
                return
            column += 1
            moved += rows * (sizes[column - 1] + sizes[column])
        until = min(step + config.chunk_tokens, sizes[column])
        smaller = place.next_rows(rows) if config.compact else 0
        steps = range(step + 1, until)
        end = next((t for t in steps if live[t] <= smaller), until) if config.early_exit else until
        yield Call(rows, sizes[column], end - step, moved)
        step, moved = end, 0


def _halves(lengths: np.ndarray, step: int, count: int) -> list[np.ndarray]:
    """`count` of the rows of each shard that are longer than `step`, and the others of them."""
    is_live = lengths > step
    order = np.cumsum(is_live, axis=1)
    return [np.where(is_live & chosen, lengths, 0) for chosen in (order <= count, order > count)]


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
    steps, parked = (sum(getattr(call, name) for call in calls) for name in ("steps", "parked"))
    return Decoding(steps, len(calls) - parked, parked, device_bytes, wire_bytes, seconds)
