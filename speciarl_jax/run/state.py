"""What training changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.types import JsonObject


@dataclasses.dataclass
class SavedRollouts:
    """Answers that wait for their step; `record` is the JSON of `algorithm.pending`."""

    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


@dataclasses.dataclass
class TrainState:
    """What training changes.

    Attributes:
        trainable: adapter or chosen base weights.
        step: finished steps.
        data: state of the prompt loader, JSON.
        rollouts: sampled for the next step already (`train.async_steps`); only in a checkpoint.
    """

    trainable: nnx.State[str, object]
    optim: OptimState
    step: int
    data: JsonObject
    rollouts: SavedRollouts | None = None

    @property
    def is_donated(self) -> bool:
        """Whether an update was given its arrays to write over, so that they are gone."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.trainable, self.optim)))
