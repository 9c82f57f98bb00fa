"""The share of a GPU's memory that jax takes, for runs and for plans alike.

jax reserves its pool when it opens the device, 75 % unless it is told otherwise. What is left is
for the CUDA context and the libraries, about 1 GB, and for whoever else is on the card. A judge on
the same card needs the user's own smaller share. No jax.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older
DEFAULT_FRAC = 0.9


def set_default(environment: MutableMapping[str, str]) -> None:
    """Asks jax for `DEFAULT_FRAC`, unless the user has chosen; before jax opens a device."""
    if not any(environment.get(name) for name in VARIABLES):
        environment[VARIABLES[0]] = str(DEFAULT_FRAC)


def usable_frac(environment: Mapping[str, str]) -> float:
    """The share that a process in this environment gets.

    Raises:
        ValueError: the variable does not hold a share.
    """
    for name in VARIABLES:
        if value := environment.get(name):
            try:
                frac = float(value)
            except ValueError:
                frac = 0.0
            if not 0 < frac <= 1:
                raise ValueError(f"{name}={value}: expected a share of the card above 0, up to 1")
            return frac
    return DEFAULT_FRAC
