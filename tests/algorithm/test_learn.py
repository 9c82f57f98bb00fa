"""When a step refuses to go on."""

import math

import pytest

from speciarl_jax.algorithm.learn import check_agreement
from speciarl_jax.config.schema import Config
from speciarl_jax.errors import TrainingStopped


def gaps(largest, mean):
    return {"mismatch/logprob_max_abs": largest, "mismatch/logprob_mean_abs": mean}


@pytest.mark.parametrize(
    ("dtype", "metrics", "is_refused"),
    [
        ("float32", gaps(2e-3, 1e-5), True),  # the maximum counts
        ("float32", gaps(1e-3, 1e-5), False),
        ("bfloat16", gaps(0.5, 1e-4), False),  # the mean counts
        ("bfloat16", gaps(0.5, 2e-3), True),
        ("float32", gaps(math.nan, math.nan), True),
        ("bfloat16", gaps(math.nan, math.nan), True),
    ],
)
def test_sampler_and_trainer_must_agree_at_step_one(dtype, metrics, is_refused):
    config = Config()
    config.model.compute_dtype, config.train.mismatch_gate = dtype, 1e-3
    check_agreement(config, metrics, step=2)  # later steps may differ: async_steps, old rollouts
    if not is_refused:
        check_agreement(config, metrics, step=1)
        return
    with pytest.raises(TrainingStopped, match=r"step 1: log-probs .* train.mismatch_gate allows"):
        check_agreement(config, metrics, step=1)
