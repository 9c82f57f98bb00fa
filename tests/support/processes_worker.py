"""One process of test_hosts.py: joins, exchanges, prints one JSON line."""

import json
import sys

import numpy as np

from speciarl_jax.devices import processes
from speciarl_jax.errors import JudgeError


def ended_together(index):
    """What both raise when the second has something to raise."""
    try:
        processes.together(0, error=JudgeError("nobody answers") if index else None)
    except JudgeError as error:
        return [str(error), error.is_shared]
    return []


if __name__ == "__main__":
    port, count, index = (int(x) for x in sys.argv[1:4])
    processes.connect(f"127.0.0.1:{port}", count, index)
    own = np.arange(4) + 10 * index
    big = 2.0**60 + 2**8 * index
    print(
        json.dumps(
            {
                "gathered": processes.gather_prompts(own).tolist(),
                "exact": processes.gather(np.float64(big)).tolist(),
                "mean": processes.mean({"a": float(index), "b": 2.0}),
                "largest": processes.largest(index, 7 - index),
                "any": [processes.any_process(index == 1), processes.any_process(False)],
                "json": processes.gather_json({"name": "é" * (index + 1)}),
                "first": processes.from_first([index]),
                "together": processes.together(index, 7 - index),
                "ended": ended_together(index),
            }
        )
    )
