"""What is kept, and what a full disk leaves."""

import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.run.checkpoint import Checkpoints
from speciarl_jax.run.state import TrainState


def make_state(step, size=8):
    values = np.random.default_rng(step).random(size).astype(np.float32)
    counter = jnp.asarray(step, jnp.int32)
    optim = OptimState({"mu": jnp.ones(3)}, counter, jnp.zeros((), jnp.int32))
    return TrainState(nnx.State({"a": nnx.Param(jnp.asarray(values))}), optim, step, {"at": step})


def test_newest_and_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, 2, keep_best=1)
    for step, hm in enumerate([0.5, 0.9, 0.6, None, 0.7], start=1):
        store.save(make_state(step), hm)
    store.wait()
    assert store.steps() == [2, 4, 5]
    state, skipped = store.restore(make_state(0))
    assert (state.step, state.data, skipped) == (5, {"at": 5}, [])
    np.testing.assert_array_equal(
        state.trainable["a"].get_value(), make_state(5).trainable["a"].get_value()
    )
    store.close()


@pytest.mark.slow
def test_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        store = Checkpoints(tmp_path / "run", 3)
        store.save(make_state(1))
        store.save(make_state(2, size=2_000_000))
        with pytest.raises(OSError, match=r"No space left.*steps \[1\] are intact"):
            store.wait()
        assert store.restore(make_state(0))[0].step == 1
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
