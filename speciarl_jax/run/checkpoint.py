"""Saving and restoring a run: adapter, optimiser, position in the data, and nothing of the base.

Orbax copies the arrays, writes them in the background into a temporary folder and renames it when
it is complete, so a kill at any moment, or a full disk, leaves either the old checkpoints or the
new one as well. A hash of each array and of the position is saved with them. A checkpoint that
cannot be read, or that is not what was saved, is reported and the one before it is used.

What a save costs the run: one pass over adapter and optimiser for the hashes, and their copy to
host memory (three float32 numbers a trained weight); the disk is written to in the background.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as ocp_managers

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.run.hashes import hash_array, hash_json, hash_tree
from speciarl_jax.run.state import SavedRollouts, TrainState

_REASON_CHARS = 200


def _hm(metrics: PyTree) -> float:
    return float(metrics["hm"])


def _drop_damaged_scores(directory: epath.Path) -> None:
    """Deletes scores that cannot be read, on which Orbax would fail: the checkpoints are whole."""
    for file in directory.glob("*/metrics/metrics"):
        try:
            content = file.read_text()  # perhaps of object storage
            _hm(json.loads(content))
        except (ValueError, TypeError, KeyError):
            step = file.parent.parent
            line = (
                f"warning: {step}: its score cannot be read, so it is not kept as one of the best"
            )
            print(line, file=sys.stderr)
            file.parent.rmtree()


@dataclasses.dataclass(frozen=True)
class SaveCost:
    """What a save held the run up for.

    Attributes:
        num_bytes: of the arrays that are written.
        hash_s: seconds for the hashes.
        total_s: seconds until training may go on, the hashes among them.
    """

    num_bytes: int
    hash_s: float
    total_s: float


class Checkpoints:
    """The ``checkpoints/`` folder of a run.

    Attributes:
        cost: of the last save, or None.
    """

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
                    get_metric_fn=_hm,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp_managers.AnyPreservationPolicy(policies),
            best_fn=_hm if keep_best else None,  # without it scores are not written to disk
            create=True,
        )
        self.directory = epath.Path(directory)
        if keep_best and jax.process_index() == 0:
            _drop_damaged_scores(self.directory)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._last_saved = -1
        self.cost: SaveCost | None = None

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
        start = time.perf_counter()
        if state.step == self._last_saved:
            return
        if state.step in self.steps():
            self._manager.delete(state.step)
        pure = _pure(state.trainable, state.optim)
        hashes = hash_tree(pure)
        hash_s = time.perf_counter() - start
        position = {"step": state.step, "data": state.data, "hashes": hashes}
        pending = {}
        if state.rollouts is not None:
            arrays = state.rollouts.arrays
            shapes = {k: [list(v.shape), v.dtype.str, hash_array(v)] for k, v in arrays.items()}
            position["rollouts"] = {"record": state.rollouts.record, "arrays": shapes}
            pending["rollouts"] = ocp.args.StandardSave(arrays)
        with self._explained():
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(pure),
                    position=ocp.args.JsonSave(position | {"hash": hash_json(position)}),
                    **pending,
                ),
                metrics=None if hm is None else {"hm": hm},
                force=True,
            )
        self._last_saved = state.step
        self.cost = SaveCost(num_bytes(pure), hash_s, time.perf_counter() - start)

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
            except (ValueError, KeyError, TypeError, OSError) as error:
                skipped.append(f"{self.directory / str(candidate)}: cannot be read ({_why(error)})")
        detail = "; ".join(skipped) or "the folder holds no complete checkpoint"
        raise ValueError(
            f"{self.directory}: nothing to resume from: {detail}; bring back a copy, or "
            "start again with --overwrite"
        )

    def _read(self, like: TrainState, step: int) -> TrainState:
        position = _checked_position(self._item(step, "position", ocp.args.JsonRestore()), step)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _pure(like.trainable, like.optim))
        pure = self._item(step, "state", ocp.args.StandardRestore(target))
        if "hashes" in position:  # checkpoints of older versions have none
            _check_hashes(position["hashes"], hash_tree(pure))
        trainable = jax.tree.map(lambda x: x, like.trainable)
        nnx.replace_by_pure_dict(trainable, pure["trainable"])
        leaves = [pure["optim"][f"{i:04d}"] for i in range(len(pure["optim"]))]
        optim = jax.tree.unflatten(jax.tree.structure(like.optim), leaves)
        rollouts = self._read_rollouts(step, position.get("rollouts"))
        return TrainState(trainable, optim, step, position["data"], rollouts)

    def _read_rollouts(self, step: int, saved: PyTree) -> SavedRollouts | None:
        if saved is None:
            return None
        target = {k: np.zeros(shape, dtype) for k, (shape, dtype, *_) in saved["arrays"].items()}
        restored = self._item(step, "rollouts", ocp.args.StandardRestore(target))
        arrays = {k: np.asarray(v) for k, v in restored.items()}
        saved_hashes = {k: rest[2] for k, rest in saved["arrays"].items() if len(rest) > 2}
        _check_hashes(saved_hashes, {k: hash_array(arrays[k]) for k in saved_hashes})
        return SavedRollouts(arrays, saved["record"])

    def _item(self, step: int, name: str, args: ocp.args.CheckpointArgs) -> PyTree:
        """One of the things that a checkpoint holds.

        Raises:
            ValueError: it cannot be read, whatever is wrong with it.
        """
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**{name: args}))
        except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, not of the file
            raise
        # Damaged files come out of Orbax and tensorstore as nearly any error: a plain Exception
        # where data are cut, AttributeError or TypeError where metadata are. None of them says
        # more than that this checkpoint is of no use and the one before it may be.
        except Exception as error:
            raise ValueError(_why(error)) from error
        return restored[name]

    def close(self) -> None:
        """Releases the folder, after `wait`."""
        self._manager.close()


def _why(error: BaseException) -> str:
    """The cause that an error names, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:_REASON_CHARS] or repr(error)


def _checked_position(position: PyTree, step: int) -> PyTree:
    """The position of a checkpoint, if it is one, of this step, and as it was saved.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(position, dict):
        raise ValueError(f"position: {type(position).__name__} where an object is expected")
    saved = position.pop("hash", None)
    unknown = position.keys() - {"step", "data", "hashes", "rollouts"}
    if unknown or not isinstance(position.get("data"), dict):
        raise ValueError(f"position: expected step and data, got {', '.join(sorted(position))}")
    if position.get("step") != step:
        raise ValueError(f"position: of step {position.get('step')!r}")
    if (saved is None) != ("hashes" not in position) or saved not in (None, hash_json(position)):
        raise ValueError("position: differs from what was saved (hash)")
    return position


def _check_hashes(saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises ValueError with the name of the first array that is not what was saved."""
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(f"{name}: differs from what was saved (hash)")


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
