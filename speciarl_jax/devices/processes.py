"""The processes of one job: how they find each other, and the few places where they agree.

Every process loads, judges and rewards its own prompts; the update, and with ``rollout.scope=job``
sampling, is one program of all. Then all launch the same programs in the same order between two
agreements, and none raises alone (`together`). What must be the same everywhere passes through here
as small host arrays: rows left after a chunk of decoding, group statistics before the update, the
stop flag, predictions of an evaluation. A process that dies takes the others with it within
`HEARTBEAT_S`: the coordination service of jax ends them with an error rather than let them wait for
ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed  # what jax exports has no way round the devices
from jax.experimental import multihost_utils

from speciarl_jax.errors import JudgeError, RunEnded, TrainingStopped

# What is called between two pieces of work: `alone`, `together`, or one that calls them. Takes
# numbers and a keyword `error`, returns the largest of each number, and may raise.
Poll: TypeAlias = Callable[..., tuple[int, ...]]
HEARTBEAT_S = 30
_EXCHANGE_S = 600  # a host may draw its pictures first
_sharing = 1  # see `share_prompts`
_SHARED_ERRORS = {kind.__name__: kind for kind in (JudgeError, TrainingStopped)}
Json = TypeVar("Json")


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the job; call once, before anything touches a device.

    Args:
        coordinator: ``HOST:PORT`` of process 0. None, with the other two None: jax finds them from
            the surroundings (Cloud TPU pod, GKE, SLURM, Open MPI).
        num_processes: of the job.
        process_id: of this process, from 0.

    Raises:
        ValueError: some but not all of the three given, or an impossible one.
        RuntimeError: the others did not come within five minutes (jax).
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id="
            f"{process_id}: give all three, or --cluster on a TPU pod, GKE, SLURM or Open MPI"
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1} (--num_processes="
            f"{num_processes})"
        )
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_S
    )


def is_first() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


def share_prompts(count: int) -> None:
    """Says that `count` neighbouring processes hold one replica, and so the same prompts."""
    global _sharing
    _sharing = count


def num_shares() -> int:
    """Parts that prompts are dealt in: the processes, fewer where replicas span several."""
    count: int = jax.process_count() // _sharing
    return count


def share_index() -> int:
    """Which part of the prompts this process has."""
    index: int = jax.process_index() // _sharing
    return index


def speaks() -> bool:
    """Whether this process asks the judge: the first of those that have the same prompts."""
    return jax.process_index() % _sharing == 0


def is_only_speaker() -> bool:
    """Whether no process has the same prompts as another."""
    return _sharing == 1


def from_speaker(value: Json) -> Json:
    """The JSON value of the process that asks the judge for this one's prompts."""
    return gather_json(value)[share_index()]


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all parts of the prompts, stacked on a new leading axis [shares, ...].

    Args:
        array: of one shape and dtype in every process; called by all of them. Bytes travel, so
            64-bit numbers arrive whole.
    """
    return _gather_all(array)[::_sharing]


def _gather_all(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if jax.process_count() == 1:
        return array[None]
    stacked = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return np.asarray(stacked).view(array.dtype).reshape(-1, *array.shape)


def gather_prompts(array: np.ndarray) -> np.ndarray:
    """Rows of all parts, one after the other, [shares * rows, ...]."""
    stacked = gather(array)
    return stacked.reshape(-1, *stacked.shape[2:])


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over all processes: padded shapes must agree."""
    return tuple(int(x) for x in _gather_all(np.asarray(numbers, np.int64)).max(axis=0))


def alone(*numbers: int, error: RunEnded | None = None) -> tuple[int, ...]:
    """`together` in a process that waits for no other."""
    if error is not None:
        raise error
    return numbers


def together(*numbers: int, error: RunEnded | None = None) -> tuple[int, ...]:
    """The largest of each number over all processes, which go on together or end together.

    Args:
        numbers: as many in every process, at the same point of its work.
        error: what this process would have to raise by itself.

    Raises:
        JudgeError, TrainingStopped: the own error, or else that of the first process with one.
    """
    *found, is_ended = largest(*numbers, int(error is not None))
    if is_ended:
        raise _shared(error)
    return tuple(found)


def _shared(own: RunEnded | None) -> RunEnded:
    """The error that this process raises when there is one anywhere."""
    everywhere = _all_json([] if own is None else [type(own).__name__, str(own)])
    index, (kind, text) = next((i, error) for i, error in enumerate(everywhere) if error)
    error = own or _SHARED_ERRORS[kind](f"process {index}: {text}")
    error.is_shared = True
    return error


def mean(numbers: Mapping[str, float]) -> dict[str, float]:
    """Each number averaged over the processes; the same names in the same order everywhere."""
    everywhere = gather(np.asarray(list(numbers.values()), np.float64)).mean(axis=0)
    return dict(zip(numbers, everywhere.tolist(), strict=True))


def any_process(flag: bool) -> bool:
    """Whether the flag is set anywhere."""
    return bool(_gather_all(np.asarray(flag, np.int32)).any())


def gather_json(value: Json) -> list[Json]:
    """The JSON values of all parts of the prompts, in their order."""
    return _all_json(value)[::_sharing]


def _all_json(value: Json) -> list[Json]:
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    (size,) = largest(len(text))
    padded = np.full(size, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes().decode()) for row in _gather_all(padded)]


def from_first(value: Json) -> Json:
    """The first process's JSON value, everywhere; the others' argument is ignored."""
    return cast(Json, gather_json(value if is_first() else None)[0])


def exchange_before_devices(topic: str, text: str) -> list[str]:
    """The texts of all processes, in process order; once for each topic, after `connect`.

    Through the coordination service of jax: no device is touched and nothing compiled, which
    processes with different versions of jax or libtpu might not survive.
    """
    job = distributed.global_state
    if job.client is None:
        return [text]
    job.client.key_value_set(f"speciarl/{topic}/{job.process_id}", text)
    names = [f"speciarl/{topic}/{index}" for index in range(job.num_processes)]
    return [job.client.blocking_key_value_get(name, 1000 * _EXCHANGE_S) for name in names]
