"""What a person sees while work goes on: bars and tables on a terminal, plain lines in a log.

On a terminal, `LiveView` keeps a bar with the remaining time and the last rollouts below the lines
that scroll by; in a log it shows nothing, for the lines say it all. `progress` does the same for an
evaluation, with a line every half minute in a log.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from speciarl_jax.monitor.tables import rollout_table
from speciarl_jax.timing import format_seconds
from speciarl_jax.types import Rollout

_LOG_EVERY_S = 30.0
_ROWS = 6  # rollouts in the live table


class _Eta(ProgressColumn):
    """The remaining time that the training loop gives: the first step compiles and misleads."""

    def render(self, task: Task) -> Text:
        eta = task.fields.get("eta_s")
        return Text("eta --:--" if eta is None else f"eta {format_seconds(eta)}")


class LiveView:
    """A bar over training steps and the last rollouts, on a terminal; nothing in a log."""

    def __init__(self, console: Console, num_steps: int, step: int) -> None:
        """Prepares the view of a run of `num_steps`, of which `step` are done."""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Eta(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step)
        self._table: Table | None = None
        self._live = None
        if console.is_terminal:
            self._live = Live(self._content(), console=console, refresh_per_second=2)

    def __enter__(self) -> LiveView:
        """Shows it."""
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes it off the screen, errors included; the lines above stay."""
        if self._live is not None:
            self._live.transient = True
            self._live.stop()

    def update(self, step: int, eta_s: float, groups: Sequence[Sequence[Rollout]]) -> None:
        """Shows a finished step; no groups (supervised steps) keep the table as it is."""
        if self._live is None:
            return
        self._progress.update(self._task, completed=step, eta_s=eta_s)
        if groups:
            self._table = rollout_table(groups, step, _ROWS)
        self._live.update(self._content())

    def _content(self) -> Group:
        return Group(self._progress) if self._table is None else Group(self._table, self._progress)


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that says how many of `total` images are done.

    On a terminal it moves a bar; in a log it prints a line every 30 s that begins with `what`.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    start = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LOG_EVERY_S or not 0 < done < total:
            return
        last = now
        eta = format_seconds((now - start) * (total - done) / done)
        console.print(f"{what}: {done}/{total} images, eta {eta}", markup=False)

    yield line
