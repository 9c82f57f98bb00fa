"""The process that compiles: a pickled request on standard input, the plan as JSON on its output.

It is a process of its own because it needs another environment (no TPU looked for, fake devices)
and a time limit, and because libtpu writes to standard error as it likes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys

from speciarl_jax.config.schema import Config
from speciarl_jax.plan.table import Plan


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        config: a validated recipe.
        topology: as given on the command line.
        has_all_buckets, price: see `make.make_plan`.
        is_search: look for the largest settings that fit first.
    """

    config: Config
    topology: str
    has_all_buckets: bool
    is_search: bool
    price: float


def answer(request: Request) -> Plan:
    """Makes the plan in this process.

    Raises:
        ValueError: the recipe cannot be laid out on the topology.
    """
    from speciarl_jax.plan.chips import open_topology
    from speciarl_jax.plan.make import make_plan, open_plan
    from speciarl_jax.plan.search import search

    topology = open_topology(request.topology)
    config, flags = request.config, ""
    if request.is_search:
        found = search(config, topology)
        config, flags = found.config, found.flags
    planned = open_plan(config, topology)
    plan = make_plan(planned, has_all_buckets=request.has_all_buckets, price=request.price)
    plan["flags"] = flags
    return plan


def main() -> int:
    """2 if the request cannot be planned; the reason is then the JSON's ``error``."""
    request = pickle.load(sys.stdin.buffer)
    try:
        json.dump(answer(request), sys.stdout)
    except ValueError as error:
        json.dump({"error": str(error)}, sys.stdout)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
