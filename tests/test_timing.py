"""Compilations by thread, shares of the wall time."""

import threading

import jax
import jax.numpy as jnp
import pytest

from speciarl_jax.timing import Goodput, compile_seconds, num_compiled


def compile_something(factor):
    jax.jit(lambda x: x * factor + 1).lower(jnp.ones(3)).compile()


def test_compilations_are_counted_by_thread_and_their_seconds_together():
    jnp.ones(3).block_until_ready()  # compiled before the count starts
    mine, seconds = num_compiled(), compile_seconds()
    compile_something(2.0)
    assert num_compiled() == mine + 1
    here = compile_seconds()
    assert here > seconds
    found = []

    def other():
        before = num_compiled()
        compile_something(3.0)
        found.append(num_compiled() - before)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [1]
    assert num_compiled() == mine + 1
    assert compile_seconds() > here


def test_goodput_adds_the_parts_up_and_leaves_the_rest_out():
    goodput = Goodput()
    goodput.add_checkpoint(2.0)
    goodput.metrics({"time/rollout_s": 1.0, "time/judge_s": 0.5})
    shares = goodput.metrics({"time/rollout_s": 3.0, "time/other_s": 9.0})
    names = ("rollout", "judge", "update", "data", "checkpoint", "compile")
    assert set(shares) == {f"goodput/{name}_frac" for name in names}
    per_second = shares["goodput/checkpoint_frac"] / 2
    assert shares["goodput/rollout_frac"] == pytest.approx(4 * per_second)
    assert shares["goodput/judge_frac"] == pytest.approx(0.5 * per_second)
    assert shares["goodput/update_frac"] == shares["goodput/data_frac"] == 0
