"""Options that are gone, in run directories that still name them; options that no recipe sets."""

import contextlib
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.algorithm.learn import Update, finish_update
from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.config.old_runs import DROPPED, without_dropped
from speciarl_jax.config.schema import Config, DataConfig, OptimConfig
from speciarl_jax.data.recipe import open_eval_source, open_train_source
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.remote.prompt import load_prompt
from speciarl_jax.judge.remote.request import build_body
from speciarl_jax.learner.optimizer import (
    OptimState,
    apply_gradients,
    init_optimizer,
    make_optimizer,
)
from speciarl_jax.run import opening
from speciarl_jax.run.restore import read_config
from speciarl_jax.run.state import TrainState
from speciarl_jax.run.storage import open_run_dir
from speciarl_jax.run.workdir import prepare_workdir
from tests.run.test_checkpoint import make_state

# --- fields that are gone -----------------------------------------------------------------------


def old_settings(**changes):
    """What an earlier version wrote: today's fields and all that are gone, at their defaults."""
    settings = json.loads(json.dumps(dataclasses.asdict(Config(name="old"))))
    for field, value in (DROPPED | changes).items():
        *sections, name = field.split(".")
        place = settings
        for section in sections:
            place = place[section]
        place[name] = value
        if sections == ["judge"] and field not in changes:
            settings["eval"]["judge"][name] = value
    return settings


def write_run(workdir, **changes):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(old_settings(**changes)))
    return workdir


def test_no_field_that_is_gone_is_there():
    today = json.loads(json.dumps(dataclasses.asdict(Config())))
    assert without_dropped(today, "config.json") == today
    before = old_settings()
    for field in DROPPED:
        section, name = field.split(".")
        assert name not in today[section]
        assert name in before[section]


def test_an_old_run_at_the_old_defaults_is_read_and_resumed(tmp_path):
    workdir = write_run(tmp_path / "run")
    assert read_config(workdir) == Config(name="old")
    prepare_workdir(open_run_dir(workdir), Config(name="old"), resume=True)
    written = json.loads((workdir / "config.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(Config(name="old"))))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.indices", [3, 1]),
        ("data.class_balanced", True),
        ("judge.prompt_price", 0.5),
        ("eval.judge.retry_after_max_s", 5.0),
        ("train.keep_every_hours", 2.0),
    ],
)
def test_an_old_run_that_used_a_field_that_is_gone_is_refused_by_name(tmp_path, field, value):
    workdir = write_run(tmp_path / "run", **{field: value})
    before = (workdir / "config.json").read_text()
    for read in (
        lambda: read_config(workdir),
        lambda: prepare_workdir(open_run_dir(workdir), Config(name="old"), resume=True),
    ):
        with pytest.raises(ValueError, match="this version has no such field") as info:
            read()
        assert str(info.value).startswith(f"{workdir / 'config.json'}: {field}={value!r}, ")
        assert "\n" not in str(info.value)
    assert (workdir / "config.json").read_text() == before


def test_a_field_of_no_version_is_refused(tmp_path):
    workdir = write_run(tmp_path / "run", **{"data.colour": 1})
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        read_config(workdir)


# --- options that stay though no recipe sets them -----------------------------------------------


def test_splits_and_the_seed_of_subsets(tmp_path):
    spec = "field_guide_birds:train=12,test=6"
    data = DataConfig(source=spec, num_train=4, num_eval=4, data_dir=str(tmp_path / "data"))

    def names(**changes):
        changed = dataclasses.replace(data, **changes)
        sources = (
            open_train_source(changed),
            open_eval_source(changed, spec, changed.eval_split, changed.num_eval),
        )
        return [[source[i].prompt_id for i in range(len(source))] for source in sources]

    training, evaluation = names()
    assert names() == [training, evaluation]
    assert names(select_seed=1)[0] != training
    assert all("/test/" in name for name in evaluation)
    assert all("/train/" in name for name in names(eval_split="train")[1])
    assert all("/test/" in name for name in names(split="test")[0])


def test_momentum_and_clipping_by_hand():
    """One AdamW step from zero: m = (1 - b1) g; a clipped gradient has the asked-for norm."""
    weights = nnx.State({"w": jnp.zeros(2)})
    grads = nnx.State({"w": jnp.array([30.0, 40.0])})
    for beta1, norm in ((0.9, 1.0), (0.5, 5.0)):
        config = OptimConfig(beta1=beta1, max_grad_norm=norm)
        optimizer = make_optimizer(config, 1)
        fresh = init_optimizer(optimizer, weights)
        _, state, _ = apply_gradients(optimizer, grads, fresh, weights, 1.0)
        (mu,) = [leaf.mu["w"] for leaf in state.inner[1] if hasattr(leaf, "mu")]
        np.testing.assert_allclose(mu, (1 - beta1) * norm * np.array([0.6, 0.8]), rtol=1e-5)


@pytest.mark.parametrize(("most", "is_stopped"), [(2, True), (3, False)])
def test_updates_that_are_skipped_in_a_row_stop_the_run(most, is_stopped):
    config = Config()
    config.optim.max_skipped_updates = most
    skipped = OptimState((), jnp.int32(5), jnp.int32(2))
    state = TrainState(nnx.State({}), skipped, 4, {})
    update = Update(
        nnx.State({}), skipped, [{"loss": jnp.float32(1), "tokens": jnp.float32(9)}], jnp.zeros(1)
    )
    if is_stopped:
        with pytest.raises(TrainingStopped, match="step 5: 2 updates in a row"):
            finish_update(config, state, update)
    else:
        assert finish_update(config, state, update)[1] == {"policy/loss": 1.0}


def test_checkpoints_that_are_kept(tmp_path):
    config = Config()
    config.train.keep_checkpoints = 1
    with contextlib.closing(opening.open_checkpoints(config, open_run_dir(tmp_path))) as store:
        for step in (1, 2):
            store.save(make_state(step))
        store.wait()
        assert store.steps() == [2]


def test_what_the_judge_is_asked_for():
    prompt, pairs = load_prompt("six_way_v1"), [Pair("owl", "bird")]
    config = JudgeConfig(kind="endpoint", model="m", max_reply_tokens=500, temperature=0.25)
    body = build_body(config, prompt, pairs, "none", "off")
    assert (body["max_tokens"], body["temperature"]) == (500, 0.25)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in build_body(config, prompt, pairs, "none", "default")
