"""A user's own code: what it may raise, and functions named by a dotted path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

# What running somebody else's module can end in, beside the ValueError and OSError that every verb
# reports: told in one line, as the fault is in their file and not in ours.
USER_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,
    SystemExit,
    TypeError,
)


def import_function(path: str, what: str) -> Callable[..., Any]:
    """A user's function by its dotted path.

    Args:
        path: ``package.module.function``, importable from where the command runs.
        what: what the function is for, for the error message.

    Raises:
        ValueError: no such module, one that cannot be imported, no such name in it, or it cannot
            be called.

    Source: own.
    """
    module_name, _, function_name = path.rpartition(".")
    expected = "expected package.module.function on PYTHONPATH"
    if not all(part.isidentifier() for part in path.split(".")) or not module_name:
        raise ValueError(f"{what} {path!r}: no dotted path; {expected}")
    try:
        module = importlib.import_module(module_name)
    except USER_CODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {path!r}: {module_name}: {reason}; {expected}") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{what} {path!r}: {module_name} has no function {function_name!r}")
    return function


def check_call(path: str, what: str, arguments: str) -> None:
    """Imports a user's function and refuses one that does not take these arguments.

    Args:
        path: its dotted path.
        what: what it is for, for the error message.
        arguments: what it is called with, by position: names joined by ", ".

    Raises:
        ValueError: see `import_function`; or it takes other arguments.
    """
    function, names = import_function(path, what), arguments.split(", ")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not say what they take
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise ValueError(
            f"{what} {path!r}: {error}; expected a function of ({arguments}), got {signature}"
        ) from error
