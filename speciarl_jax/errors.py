"""Errors that end a run on purpose: each message is one line with the remedy.

exit code   0 done   1 failed   2 bad usage   75 stopped by pre-emption and saved
"""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class JudgeError(RuntimeError):
    """The judge as a whole cannot be used. One line: expected, got, where, what to do."""

    exit_code: ClassVar[int] = EXIT_FAILED


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message is one line with the remedy. Everything is saved."""

    exit_code: ClassVar[int] = EXIT_FAILED


class Preempted(RuntimeError):
    """SIGTERM came; the run is saved and goes on with --resume."""

    exit_code: ClassVar[int] = EXIT_PREEMPTED


class NoSuchSplit(ValueError):
    """A source has no pictures under the name of a split; the message lists those it has."""


# ValueError is what a user can repair: a recipe, a flag, a file.
EXPECTED = (ValueError, OSError, JudgeError, TrainingStopped, Preempted)


def exit_code(error: BaseException) -> int:
    """The exit code of one of the `EXPECTED` errors."""
    if isinstance(error, ValueError):
        return EXIT_USAGE
    return getattr(error, "exit_code", EXIT_FAILED)
