"""Saving and restoring a run: adapter, optimiser, position in the data, and nothing of the base.

Orbax writes into a temporary folder and renames it when it is complete, so a kill at any moment
leaves either the old checkpoints or the new one as well. A checkpoint that cannot be read is
reported and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from speciarl_jax.optim import OptimState

_UNREADABLE = (ValueError, KeyError, TypeError, OSError)


@dataclasses.dataclass
class TrainState:
    """What training changes.

    Attributes:
        trainable: adapter or chosen base weights.
        optim: optimiser state.
        step: finished steps.
        data: state of the prompt loader, JSON.
    """

    trainable: nnx.State
    optim: OptimState
    step: int
    data: dict[str, Any]


class Checkpoints:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, workdir: pathlib.Path, keep: int) -> None:
        """Opens the folder; creates it if needed.

        Args:
            workdir: run directory.
            keep: newest checkpoints to keep.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self.directory = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint; it is complete on disk when this returns.

        One of the same step can only be damaged (`restore` skipped it), so it is replaced.
        """
        if state.step in self.steps():
            self._manager.delete(state.step)
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_pure(state.trainable, state.optim)),
                position=ocp.args.JsonSave({"step": state.step, "data": state.data}),
            ),
            force=True,
        )
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, list[str]]:
        """Reads a checkpoint.

        Args:
            like: shapes, dtypes and places to restore into.
            step: which one; None for the newest that can be read.

        Returns:
            (state, one line for each newer checkpoint that had to be skipped).

        Raises:
            ValueError: none there, or none that can be read; the message lists what was tried.
        """
        steps = self.steps() if step is None else [step]
        skipped = []
        for candidate in reversed(steps):
            try:
                return self._read(like, candidate), skipped
            except _UNREADABLE as error:
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                skipped.append(f"{self.directory / str(candidate)}: cannot be read ({reason})")
        detail = "; ".join(skipped) or "the folder holds no complete checkpoint"
        raise ValueError(f"{self.directory}: nothing to resume from: {detail}")

    def _read(self, like: TrainState, step: int) -> TrainState:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _pure(like.trainable, like.optim))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore()
            ),
        )
        pure, position = restored["state"], restored["position"]
        trainable = jax.tree.map(lambda x: x, like.trainable)
        nnx.replace_by_pure_dict(trainable, pure["trainable"])
        leaves = [pure["optim"][f"{i:04d}"] for i in range(len(pure["optim"]))]
        optim = jax.tree.unflatten(jax.tree.structure(like.optim), leaves)
        return TrainState(trainable, optim, int(position["step"]), position["data"])

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()


def _pure(trainable: nnx.State, optim: OptimState) -> dict[str, Any]:
    """Plain dictionaries of arrays: readable without this package's classes."""
    leaves = jax.tree.leaves(optim)
    return {
        "trainable": nnx.to_pure_dict(trainable),
        "optim": {f"{i:04d}": leaf for i, leaf in enumerate(leaves)},
    }


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
