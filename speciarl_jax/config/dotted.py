"""A user's own function, named by a dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def import_function(path: str, what: str) -> Callable[..., Any]:
    """A user's function by its dotted path.

    Args:
        path: ``package.module.function``, importable from where the command runs.
        what: what the function is for, for the error message.

    Raises:
        ValueError: no such module, no such name in it, or it cannot be called.

    Source: own.
    """
    module_name, _, function_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {path!r}: {error}; expected package.module.function on PYTHONPATH"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{what} {path!r}: {module_name} has no function {function_name!r}")
    return function
