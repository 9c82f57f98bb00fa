"""Where work in progress may be left: between its chunks, by all processes that share it."""

from __future__ import annotations

from collections.abc import Callable

import jax

from speciarl_jax.devices.processes import Poll
from speciarl_jax.errors import RunEnded, TrainingStopped
from speciarl_jax.run.preemption import StepAbandoned, StopFlag
from speciarl_jax.run.session import Session
from speciarl_jax.run.storage import RunDir


def make_poll(session: Session, run_dir: RunDir, stop: StopFlag, beat: Callable[[], None]) -> Poll:
    """What sampling and waiting call between two pieces of work.

    Processes that sample together leave together: one stop, one lost run, one judge that gave up is
    known to all in the agreement that they make anyway. Those that sample by themselves do not
    leave, for no other would know; they agree after the step.

    Args:
        session: whose processes agree.
        run_dir: that must still be this run's.
        stop: of this process.
        beat: says that it is alive.
    """
    can_leave = jax.process_count() == 1 or session.engine.is_job

    def poll(*numbers: int, error: RunEnded | None = None) -> tuple[int, ...]:
        beat()
        if can_leave:
            try:
                run_dir.check_held()
            except TrainingStopped as lost:
                error = error or lost
        *found, is_stopped = session.agree(*numbers, int(stop.is_set), error=error)
        if is_stopped and can_leave:
            raise StepAbandoned
        return tuple(found)

    return poll
