"""train.async_steps=1: staleness, correction, determinism, pending rollouts in a checkpoint."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax import train
from speciarl_jax.algorithm import pending
from speciarl_jax.learner.optimizer import OptimState
from speciarl_jax.monitor import writer
from speciarl_jax.run import checkpoint
from speciarl_jax.run.state import SavedRollouts, TrainState
from speciarl_jax.types import Category, Failure, FailureKind, Rollout, Verdict
from tests.support.training import QUIET, rows, run_stopped_and_resumed, small_config

ASYNC = {"train__async_steps": 1, "algo__importance_cap": 2.0, "optim__learning_rate": 1e-2}


def make_rollout(outcome):
    tokens, logprobs = np.array([5, 6, 7], np.int32), np.array([-0.1, -2.0, -0.3], np.float32)
    return Rollout("d/train/1", "d", "wren", 1, tokens, logprobs, "text", "wren", False, 3, outcome)


@pytest.mark.parametrize(
    "outcome",
    [None, Verdict(Category.LESS_SPECIFIC, "m", True), Failure(FailureKind.TIMEOUT, "no reply")],
)
def test_rollout_survives_json(outcome):
    rollout = make_rollout(outcome)
    fields = json.loads(json.dumps(pending._to_json(rollout)))
    arrays = {
        "lengths": np.array([[3]]),
        "tokens": np.array([[[5, 6, 7, 0]]], np.int32),
        "rollout_logprobs": np.array([[[-0.1, -2.0, -0.3, 0.0]]], np.float32),
    }
    back = pending._from_json(fields, arrays, 0, 0)
    for field in dataclasses.fields(Rollout):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(rollout, field.name))


def test_checkpoint_holds_pending_rollouts(tmp_path):
    """Arrays keep dtype and bits; a checkpoint without any restores None."""
    arrays = {
        "tokens": np.arange(12, dtype=np.int32).reshape(1, 3, 4),
        "rollout_logprobs": np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32),
    }
    saved = SavedRollouts(arrays, {"step": 2, "groups": [[{"prompt_id": "a"}]]})
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    counter = jnp.zeros((), jnp.int32)
    optim = OptimState({"m": jnp.zeros(3)}, counter, counter)
    state = TrainState(nnx.State({"a": jnp.ones(2)}), optim, 1, {"position": 4})
    store.save(dataclasses.replace(state, rollouts=saved))
    restored = store.restore(state)[0].rollouts
    assert restored.record == saved.record
    for name, array in arrays.items():
        assert restored.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(restored.arrays[name], array)
    store.save(dataclasses.replace(state, step=2))
    assert store.restore(state)[0].rollouts is None
    store.close()


@pytest.mark.slow
def test_staleness_is_one_and_the_first_steps_are_as_without(tmp_path):
    """Step 1 is on-policy; step 2 samples with the same policy as step 1 and is corrected."""
    config = {"train__num_steps": 3, **QUIET}
    train.main(small_config(**config, **ASYNC), tmp_path / "a")
    train.main(small_config(**config, **ASYNC), tmp_path / "b")
    plain = {"algo__importance_cap": 2.0, "optim__learning_rate": 1e-2}
    train.main(small_config(**config, **plain), tmp_path / "sync")
    ahead, again, sync = rows(tmp_path / "a"), rows(tmp_path / "b"), rows(tmp_path / "sync")
    assert ahead == again
    assert [row["rollout/staleness"] for row in ahead] == [0, 1, 1]
    assert [row["rollout/staleness"] for row in sync] == [0, 0, 0]
    assert ahead[0] == sync[0]
    assert sync[1]["mismatch/logprob_max_abs"] < 1e-4 < ahead[1]["mismatch/logprob_max_abs"]
    assert sync[1]["policy/importance_mean"] == pytest.approx(1.0, abs=1e-4)
    assert ahead[1]["policy/importance_mean"] != sync[1]["policy/importance_mean"]
    assert all(row["policy/grad_norm"] > 0 for row in ahead)


@pytest.mark.slow
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_resumes_bit_for_bit_with_pending_rollouts(tmp_path, is_dynamic):
    changes = {"algo__dynamic_sampling": True, "algo__generation_prompts": 3} if is_dynamic else {}
    whole, resumed = run_stopped_and_resumed(tmp_path, train__num_steps=4, **ASYNC, **changes)
    assert whole == resumed
    assert [row["rollout/staleness"] for row in resumed] == [0, 1, 1, 1]
    assert len(writer.read_rows(tmp_path / "stopped" / "metrics.jsonl")) == 4


@pytest.mark.slow
def test_ratio_to_the_sampler_is_the_other_correction(tmp_path):
    """old_logprobs=rollout: the clipped ratio spans the step, so a narrow range clips at step 2.

    At step 1 the ratio is that of two programs with the same parameters, within 1e-4.
    """
    changes = {**ASYNC, "algo__importance_cap": 0.0, "algo__old_logprobs": "rollout"}
    changes |= {"algo__clip_eps_low": 1e-4, "algo__clip_eps_high": 1e-4}
    train.main(small_config(train__num_steps=2, **changes, **QUIET), tmp_path / "run")
    first, second = rows(tmp_path / "run")
    assert first["policy/clip_low_frac"] + first["policy/clip_high_frac"] == 0
    assert second["policy/clip_low_frac"] + second["policy/clip_high_frac"] > 0
