"""jax takes the same share of a GPU in a run and in a plan, and a user's own choice stands."""

import os

import pytest

from speciarl_jax.cli.main import main
from speciarl_jax.devices import gpu_memory
from speciarl_jax.plan.chips import GIB, open_topology

NEW, OLD = gpu_memory.VARIABLES


@pytest.mark.parametrize(
    ("before", "after", "frac"),
    [
        ({}, {NEW: "0.9"}, 0.9),
        ({NEW: ""}, {NEW: "0.9"}, 0.9),
        ({NEW: "0.5"}, {NEW: "0.5"}, 0.5),
        ({OLD: ".3"}, {OLD: ".3"}, 0.3),  # jax refuses both at once
    ],
)
def test_the_default_never_replaces_what_the_user_says(before, after, frac):
    environment = dict(before)
    gpu_memory.set_default(environment)
    assert environment == after
    assert gpu_memory.usable_frac(environment) == frac


@pytest.mark.parametrize("value", ["80%", "0", "1.5", "nan"])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=f"{NEW}={value}: expected a share"):
        gpu_memory.usable_frac({NEW: value})


def test_plan_counts_with_the_share_that_a_run_would_take(monkeypatch):
    monkeypatch.delenv(OLD, raising=False)
    monkeypatch.setenv(NEW, "0.25")
    assert open_topology("gpu:l4x1").chip.usable_bytes == 22 * GIB // 4
    monkeypatch.delenv(NEW)
    assert open_topology("gpu:l4x1").chip.usable_bytes == int(22 * GIB * 0.9)


def test_every_verb_asks_for_it(monkeypatch):
    monkeypatch.delenv(OLD, raising=False)
    monkeypatch.delenv(NEW, raising=False)
    assert main(["data", "list"]) == 0
    assert os.environ[NEW] == "0.9"
