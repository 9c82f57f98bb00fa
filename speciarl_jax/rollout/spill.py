"""Rows that wait on the host while others use the memory of their caches.

A wave has room for answers of expected lengths (`memory.prompts_per_wave`). Before its caches
would grow beyond that, the live rows of every shard are halved: one half goes on, the other one's
state is copied to the host and comes back when the first has ended. What a row samples depends on
its key alone, so neither half notices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array

from speciarl_jax.rollout.decode import DecodeState
from speciarl_jax.rollout.layout import Rows

if TYPE_CHECKING:
    from speciarl_jax.rollout.engine import Wave


@dataclasses.dataclass(frozen=True)
class HostArray:
    """An array of a device, or of several, as this process holds it: one part for each device."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[jax.Device, np.ndarray]

    @classmethod
    def of(cls, x: Array) -> HostArray:
        """Copies an array to the host."""
        parts = {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}
        return cls(x.shape, x.sharding, parts)

    def back(self) -> Array:
        """On its devices again."""
        parts = [jax.device_put(part, device) for device, part in self.parts.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


@dataclasses.dataclass(frozen=True)
class Parked:
    """Rows that wait, the step that they have reached, and `Wave.most_live` of them."""

    rows: Rows
    state: DecodeState[HostArray]
    step: int
    most_live: int


def park_half(wave: Wave, shrink: Callable[[Wave], object]) -> None:
    """Sends half of the live rows of each shard to the host and makes the others a smaller batch.

    All processes that sample together do the same, for they have agreed on `most_live`.

    Args:
        wave: two rows of a shard are live at least.
        shrink: moves a wave's live rows to the smallest batch that holds them.
    """
    half = -(-wave.most_live // 2)
    stay, wait = wave.rows.halves(half)
    later = dataclasses.replace(wave, rows=wait, most_live=wave.most_live - half)
    shrink(later)
    state: DecodeState[HostArray] = jax.tree.map(HostArray.of, later.state)
    wave.parked.append(Parked(later.rows, state, later.step, later.most_live))
    del later
    wave.rows, wave.most_live = stay, half
    shrink(wave)


def resume(wave: Wave) -> bool:
    """Brings the rows back that were parked last; False if none wait."""
    if not wave.parked:
        return False
    parked = wave.parked.pop()
    wave.rows, wave.step, wave.most_live = parked.rows, parked.step, parked.most_live
    wave.state = jax.tree.map(HostArray.back, parked.state)
    return True
