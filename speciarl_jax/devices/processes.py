"""The processes of one job: how they find each other, and the few places where they agree.

Every process loads, samples, judges and rewards its own prompts; the update is one global program.
What must be the same everywhere passes through here as small host arrays, in the same order in
every process: group statistics before the update, the stop flag after it, predictions of an
evaluation. A process that dies takes the others with it within `HEARTBEAT_S`: the coordination
service of jax ends them with an error rather than let them wait for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar, cast

import jax
import numpy as np
from jax._src import distributed  # what jax exports has no way round the devices
from jax.experimental import multihost_utils

HEARTBEAT_S = 30
_EXCHANGE_S = 600  # a host may draw its pictures first
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


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked on a new leading axis [processes, ...].

    Args:
        array: of one shape and dtype in every process; called by all of them. Bytes travel, so
            64-bit numbers arrive whole.
    """
    array = np.asarray(array)
    if jax.process_count() == 1:
        return array[None]
    stacked = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return np.asarray(stacked).view(array.dtype).reshape(-1, *array.shape)


def gather_prompts(array: np.ndarray) -> np.ndarray:
    """Rows of all processes, one after the other, [processes * rows, ...]."""
    stacked = gather(array)
    return stacked.reshape(-1, *stacked.shape[2:])


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over all processes: padded shapes must agree."""
    return tuple(int(x) for x in gather(np.asarray(numbers, np.int64)).max(axis=0))


def mean(numbers: Mapping[str, float]) -> dict[str, float]:
    """Each number averaged over the processes; the same names in the same order everywhere."""
    everywhere = gather(np.asarray(list(numbers.values()), np.float64)).mean(axis=0)
    return dict(zip(numbers, everywhere.tolist(), strict=True))


def any_process(flag: bool) -> bool:
    """Whether the flag is set anywhere."""
    return bool(gather(np.asarray(flag, np.int32)).any())


def gather_json(value: Json) -> list[Json]:
    """The JSON values of all processes, in process order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    (size,) = largest(len(text))
    padded = np.full(size, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes().decode()) for row in gather(padded)]


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
