"""Saving and restoring a run: adapter, optimiser, position in the data, and nothing of the base.

Orbax copies the arrays, writes them in the background into a temporary folder and renames it when
it is complete, so a kill at any moment, or a full disk, leaves either the old checkpoints or the
new one as well. A checkpoint that cannot be read is reported and the one before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as ocp_managers

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.run.state import SavedRollouts, TrainState

_UNREADABLE = (ValueError, KeyError, TypeError, OSError)


class Checkpoints:
    """The ``checkpoints/`` folder of a run."""

    def __init__(self, directory: epath.PathLike, keep: int, *, keep_best: int = 0) -> None:
        """Opens the folder; creates it if needed.

        Args:
            directory: see `storage.RunDir`; absolute.
            keep: newest checkpoints to keep.
            keep_best: beside them, those with the highest HM at their validation.
        """
        policies: list[ocp_managers.PreservationPolicy] = [ocp_managers.LatestN(keep)]
        if keep_best:
            policies.append(
                ocp_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["hm"],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp_managers.AnyPreservationPolicy(policies), create=True
        )
        self.directory = epath.Path(directory)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._last_saved = -1

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, hm: float | None = None) -> None:
        """Starts writing a checkpoint, arrays copied; `wait` says when it is complete on disk.

        A second save of one step by this object does nothing. One of an earlier process can only
        be damaged (`restore` skipped it), so it is replaced. `hm` is that of its validation.

        Raises:
            OSError: this or the last checkpoint cannot be written; those before are intact.
        """
        self.wait()
        if state.step == self._last_saved:
            return
        if state.step in self.steps():
            self._manager.delete(state.step)
        position = {"step": state.step, "data": state.data}
        pending = {}
        if state.rollouts is not None:
            shapes = {k: [list(v.shape), v.dtype.str] for k, v in state.rollouts.arrays.items()}
            position["rollouts"] = {"record": state.rollouts.record, "arrays": shapes}
            pending["rollouts"] = ocp.args.StandardSave(state.rollouts.arrays)
        with self._explained():
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_pure(state.trainable, state.optim)),
                    position=ocp.args.JsonSave(position),
                    **pending,
                ),
                metrics=None if hm is None else {"hm": hm},
                force=True,
            )
        self._last_saved = state.step

    def wait(self) -> None:
        """Returns when the checkpoint under way is complete on disk.

        Raises:
            OSError: it cannot be written; those before are intact.
        """
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What Orbax and tensorstore say of a full or broken disk, as one error with the remedy."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[-160:]  # the cause comes last
            raise OSError(
                f"{self.directory}: cannot write a checkpoint ({reason}); the checkpoints of steps "
                f"{self.steps()} are intact: free space there, then --resume"
            ) from error

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
        skipped: list[str] = []
        for candidate in reversed(steps):
            try:
                return self._read(like, candidate), skipped
            except _UNREADABLE as error:
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                skipped.append(f"{self.directory / str(candidate)}: cannot be read ({reason})")
        detail = "; ".join(skipped) or "the folder holds no complete checkpoint"
        raise ValueError(
            f"{self.directory}: nothing to resume from: {detail}; bring back a copy, or "
            "start again with --overwrite"
        )

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
        rollouts = self._read_rollouts(step, position.get("rollouts"))
        return TrainState(trainable, optim, int(position["step"]), position["data"], rollouts)

    def _read_rollouts(self, step: int, saved: dict[str, Any] | None) -> SavedRollouts | None:
        if saved is None:
            return None
        target = {k: np.zeros(shape, dtype) for k, (shape, dtype) in saved["arrays"].items()}
        args = ocp.args.Composite(rollouts=ocp.args.StandardRestore(target))
        restored = self._manager.restore(step, args=args)["rollouts"]
        return SavedRollouts({k: np.asarray(v) for k, v in restored.items()}, saved["record"])

    def close(self) -> None:
        """Releases the folder, after `wait`."""
        self._manager.close()


def _pure(trainable: nnx.State[str, object], optim: OptimState) -> dict[str, PyTree[jax.Array]]:
    """Plain dictionaries of arrays: readable without this package's classes."""
    leaves = jax.tree.leaves(optim)
    return {
        "trainable": nnx.to_pure_dict(trainable),
        "optim": {f"{i:04d}": leaf for i, leaf in enumerate(leaves)},
    }


def num_bytes(tree: PyTree) -> int:
    """Bytes of all arrays in a tree."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
