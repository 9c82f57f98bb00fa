"""What training changes."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.types import JsonObject


@dataclasses.dataclass
class SavedRollouts:
    """Answers that wait for their step: `arrays` of numpy, `record` of JSON."""

    arrays: dict[str, np.ndarray]
    record: JsonObject


@dataclasses.dataclass
class TrainState:
    """What training changes.

    Attributes:
        trainable: adapter or chosen base weights.
        optim: optimiser state.
        step: finished steps.
        data: state of the prompt loader, JSON.
        rollouts: sampled for the next step already (`train.async_steps`); only in a checkpoint.
    """

    trainable: nnx.State[str, object]
    optim: OptimState
    step: int
    data: JsonObject
    rollouts: SavedRollouts | None = None
