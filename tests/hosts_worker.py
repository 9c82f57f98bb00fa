"""One process of test_hosts.py: joins, exchanges, prints one JSON line."""

import json
import sys

import numpy as np

from speciarl_jax import hosts

if __name__ == "__main__":
    port, count, index = (int(x) for x in sys.argv[1:4])
    hosts.connect(f"127.0.0.1:{port}", count, index)
    own = np.arange(4) + 10 * index
    big = 2.0**60 + 2**8 * index
    print(
        json.dumps(
            {
                "gathered": hosts.gather_prompts(own).tolist(),
                "exact": hosts.gather(np.float64(big)).tolist(),
                "mean": hosts.mean({"a": float(index), "b": 2.0}),
                "largest": hosts.largest(index, 7 - index),
                "any": [hosts.any_process(index == 1), hosts.any_process(False)],
                "json": hosts.gather_json({"name": "é" * (index + 1)}),
                "first": hosts.from_first([index]),
            }
        )
    )
