"""A run whose scores come from another judge than its rewards, as in the paper."""

import json

import pytest

from speciarl_jax import train
from speciarl_jax.monitor.writer import read_rows
from tests.support.training import small_config


@pytest.mark.slow
def test_rewards_and_scores_have_a_judge_each(tmp_path):
    """The tree of the evaluation lacks every bird, that of the training has them."""
    (tmp_path / "tree.json").write_text('{"name": "thing", "children": [{"name": "boat"}]}')
    config = small_config(
        eval__score_trained=False, train__num_steps=1, eval__use_train_judge=False
    )
    config.eval.judge.taxonomy = str(tmp_path / "tree.json")
    train.main(config, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "eval" / "base" / "metrics.json").read_text())
    assert scores["averages"]["all"]["judge_failure_rate"]["value"] > 0.9
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["step"] == 1]
    assert row["judge/failed_frac"] < 0.1
