"""Two real processes agree; bad flags are one clear line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from speciarl_jax.devices import processes
from tests.support.training import free_port


def test_two_processes_agree():
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes_worker", str(port), "2", str(index)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    found = [json.loads(w.communicate(timeout=120)[0].splitlines()[-1]) for w in workers]
    assert found[0].pop("ended") == ["process 1: nobody answers", True]
    assert found[1].pop("ended") == ["nobody answers", True]
    for answer in found:
        assert answer == {
            "gathered": [0, 1, 2, 3, 10, 11, 12, 13],
            "exact": [2.0**60, 2.0**60 + 2**8],
            "mean": {"a": 0.5, "b": 2.0},
            "largest": [1, 7],
            "any": [True, False],
            "json": [{"name": "é"}, {"name": "éé"}],
            "first": [0],
            "together": [1, 7],
        }


def test_one_process_needs_no_partner():
    rows = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(processes.gather_prompts(rows), rows)
    assert processes.gather_json({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("flags", [("h:1", None, 0), (None, 2, None), ("h:1", 2, 2)])
def test_impossible_flags(flags):
    with pytest.raises(ValueError, match=r"give all three|expected 0 to 1"):
        processes.connect(*flags)
