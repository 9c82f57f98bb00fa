"""Errors that end a run on purpose: each message is one line with the remedy.

exit code   0 done   1 failed   2 bad usage   75 stopped by pre-emption   130 stopped by Ctrl-C
"""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130


class RunEnded(RuntimeError):
    """A run cannot go on. One line: expected, got, where, what to do.

    Attributes:
        is_shared: all processes of the job raise it at the same point, so they can save together.
    """

    exit_code: ClassVar[int] = EXIT_FAILED
    is_shared = False


class JudgeError(RunEnded):
    """The judge as a whole cannot be used."""


class TrainingStopped(RunEnded):
    """The numbers or the machine do not allow to go on. Everything is saved."""


class Stopped(RuntimeError):
    """Somebody stopped the command; what there is is saved and the same command goes on.

    Attributes:
        is_resumed: `speciarl train` needs ``--resume`` for that.
    """

    exit_code: ClassVar[int]

    def __init__(self, message: str, *, is_resumed: bool = False) -> None:
        """Args: one line; whether there is a run to resume."""
        super().__init__(message)
        self.is_resumed = is_resumed


class Preempted(Stopped):
    """SIGTERM came."""

    exit_code = EXIT_PREEMPTED


class Interrupted(Stopped):
    """Ctrl-C came."""

    exit_code = EXIT_INTERRUPTED


class NoSuchSplit(ValueError):
    """A source has no pictures under the name of a split; the message lists those it has."""


# ValueError is what a user can repair: a recipe, a flag, a file.
EXPECTED = (ValueError, OSError, JudgeError, TrainingStopped, Stopped)


def exit_code(error: BaseException) -> int:
    """The exit code of one of the `EXPECTED` errors."""
    if isinstance(error, ValueError):
        return EXIT_USAGE
    return getattr(error, "exit_code", EXIT_FAILED)
