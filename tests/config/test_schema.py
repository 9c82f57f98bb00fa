"""Numbers that follow from a recipe."""

import pytest

from speciarl_jax.config.schema import Config


def recipe(**changes):
    config = Config()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def test_updates_of_a_step_and_of_a_run():
    config = recipe(
        train__prompts_per_step=256, train__prompts_per_update=128, train__num_steps=165
    )
    assert (config.updates_per_step, config.num_updates) == (2, 330)


def test_prompts_sampled_at_a_time():
    assert recipe(train__prompts_per_step=16).generation_prompts == 16
    assert recipe(train__prompts_per_step=16, algo__generation_prompts=48).generation_prompts == 48


@pytest.mark.parametrize(
    ("updates", "old", "cap", "needed"),
    [
        (1, "recompute", 0.0, False),  # exactly on-policy: the update's own
        (2, "recompute", 0.0, True),
        (2, "rollout", 0.0, False),  # the sampler's stand in for them
        (1, "recompute", 2.0, True),  # the correction compares trainer and sampler
        (1, "rollout", 0.0, False),
    ],
)
def test_when_old_logprobs_are_needed(updates, old, cap, needed):
    config = recipe(
        train__prompts_per_step=8,
        train__prompts_per_update=8 // updates,
        algo__old_logprobs=old,
        algo__importance_cap=cap,
    )
    assert config.needs_old_logprobs is needed


@pytest.mark.parametrize(
    ("rank", "train_base", "expected"), [(8, False, True), (8, True, False), (0, True, False)]
)
def test_an_adapter_is_trained_or_the_base(rank, train_base, expected):
    assert recipe(lora__rank=rank, model__train_base=train_base).has_adapter is expected


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_an_activation(dtype, expected):
    assert recipe(model__compute_dtype=dtype).model.compute_bytes == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__remat": "some"}, "model.remat='some': expected one of none, dots, full"),
        ({"algo__reward": "best"}, "algo.reward='best': expected one of dynamic, single"),
        ({"algo__aggregation": "a.b"}, "algo.aggregation='a.b': expected one of"),
        ({"algo__label_noise": 1.5}, "algo.label_noise=1.5: set it between 0 and 1"),
        ({"algo__clip_dual": 1.0}, "algo.clip_dual=1.0: set it above 1, or 0"),
        ({"train__prompts_per_micro_batch": 0}, "train.prompts_per_micro_batch=0: set it to at"),
        ({"train__prompts_per_step": 200}, "train.prompts_per_step=200 is not a multiple of"),
    ],
)
def test_each_field_has_its_range(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes).validate()


def test_a_users_own_reward_and_advantage_are_dotted_paths():
    recipe(algo__name="mine.advantage", algo__reward="mine.reward").validate()
    for field, message in {"name": "algo.name='mine'", "reward": "algo.reward='mine'"}.items():
        with pytest.raises(ValueError, match=message):
            recipe(**{f"algo__{field}": "mine"}).validate()
