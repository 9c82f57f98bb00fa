"""Numbers that follow from a recipe."""

import dataclasses
import functools
import math

import ml_dtypes
import numpy as np
import pytest

from speciarl_jax.config import ranges
from speciarl_jax.config.schema import Config


def recipe(**changes):
    config = Config()
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
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
        ({"optim__learning_rate": 0.0}, "optim.learning_rate=0.0: set a number > 0"),
        ({"optim__learning_rate": -1e-5}, "optim.learning_rate=-1e-05: set a number > 0"),
        ({"optim__learning_rate": math.inf}, "optim.learning_rate=inf: expected a finite number"),
        ({"train__mismatch_gate": math.nan}, "train.mismatch_gate=nan: expected a finite number"),
        ({"optim__schedule": "cosin"}, "expected one of constant.*; did you mean cosine?"),
        ({"algo__bar_support": 11.0}, "bar_support=11: a group has rollout.group_size=10"),
        ({"algo__bar_support": 1.5}, "bar_support=1.5: set a whole number of answers, or a share"),
        ({"algo__failed_quorum_frac": 1.2}, "failed_quorum_frac=1.2: set it between 0 and 1"),
        ({"algo__failed_budget_frac": -0.1}, "failed_budget_frac=-0.1: set it between 0 and 1"),
        ({"algo__overlong_buffer_tokens": 2049}, "overlong_buffer_tokens=2049: the penalty would"),
        ({"optim__beta2": 1.0}, "optim.beta2=1.0: set it at least 0 and below 1"),
        ({"train__save_every": 0}, "train.save_every=0: set it to at least 1"),
        ({"rollout__top_p": 0.0}, "rollout.top_p=0.0: set it above 0"),
        ({"eval__best_of_top_p": 2.0}, "eval.best_of_top_p=2.0: set it above 0"),
        ({"lora__alpha": 0.0}, "lora.alpha=0.0: the adapter would be scaled by 0"),
        ({"lora__targets": "(q"}, "lora.targets: not a regular expression"),
        ({"data__prompt_buckets": (64, 32)}, "data.prompt_buckets=.64, 32.: set sizes"),
        (
            {"model__compute_dtype": "bfloat16", "data__prompt_buckets": (32, 63)},
            "data.prompt_buckets: 63 is odd, and with model.compute_dtype=bfloat16 .*; set 64",
        ),
        (
            {"model__compute_dtype": "bfloat16", "rollout__max_completion_tokens": 129},
            "rollout.max_completion_tokens: 129 is odd, .*; set 130",
        ),
        ({"seed": -1}, "seed=-1: set it to at least 0"),
        ({"seed": 2**31}, "seed=2147483648: set it below 2"),
    ],
)
def test_each_field_has_its_range(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes).validate()


def test_odd_lengths_are_for_single_precision():
    recipe(data__prompt_buckets=(32, 63), rollout__max_completion_tokens=129).validate()


def test_a_users_own_reward_and_advantage_are_dotted_paths():
    recipe(algo__name="mine.advantage", algo__reward="mine.reward").validate()
    for field, message in {"name": "algo.name='mine'", "reward": "algo.reward='mine'"}.items():
        with pytest.raises(ValueError, match=message):
            recipe(**{f"algo__{field}": "mine"}).validate()


@pytest.mark.parametrize("what", ["train_base", "train_vision"])
@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_a_trained_base_has_no_reference_for_a_kl(what, name):
    """Only with the adapter off is the reference still there; supervised steps have no KL."""
    config = recipe(**{f"model__{what}": True}, algo__kl_coef=0.01, algo__name=name)
    if name == "sft":
        config.validate()
        return
    with pytest.raises(ValueError, match=rf"kl_coef=0.01 with model.{what}=true: .*kl_coef=0$"):
        config.validate()
    config.algo.kl_coef = 0.0
    config.validate()


@pytest.mark.parametrize("what", ["train_base", "train_vision"])
def test_a_base_is_not_trained_in_sixteen_bits(what):
    config = recipe(**{f"model__{what}": True}, algo__kl_coef=0.0, model__compute_dtype="bfloat16")
    config.validate()
    config.model.param_dtype = "bfloat16"
    with pytest.raises(ValueError, match=r"param_dtype=bfloat16 with .*set model.param_dtype=floa"):
        config.validate()
    setattr(config.model, what, False)
    config.validate()  # a frozen base may be; the adapter is float32 whatever the base is


def test_sixteen_bits_would_swallow_an_update():
    """Why it is refused: a weight of .02 and 50 steps of 1e-6, the learning rate of a base."""
    small, large = np.array(0.02, ml_dtypes.bfloat16), np.array(0.02, np.float32)
    for _ in range(50):
        small, large = (w - np.array(1e-6, w.dtype) for w in (small, large))
    assert small == np.array(0.02, ml_dtypes.bfloat16)
    assert large < 0.01996


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        ("train", "num_step", 5, "train.num_step: no such field; did you mean train.num_steps"),
        ("", "trian", 5, "trian: no such field; did you mean train"),
        ("eval.judge", "endpoint", "x", "eval.judge.endpoint: no such field; .*judge.endpoints"),
        ("judge", "endpoints", "http://a/v1", "judge.endpoints='http://a/v1': expected tuple"),
        ("data", "eval_sources", ("cub", 3), "data.eval_sources=.*: expected tuple"),
        ("optim", "learning_rate", "3e-5", "optim.learning_rate='3e-5': expected float, got str"),
        ("train", "num_steps", 5.0, "train.num_steps=5.0: expected int, got float"),
        ("train", "num_steps", True, "train.num_steps=True: expected int, got bool"),
        ("model", "train_base", 1, "model.train_base=1: expected bool, got int"),
        ("", "optim", {"learning_rate": 1e-4}, "optim=.*: expected a OptimConfig"),
    ],
)
def test_a_recipe_holds_what_the_schema_declares(place, name, value, message):
    config = recipe()
    config.validate()
    setattr(functools.reduce(getattr, filter(None, place.split(".")), config), name, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        config.validate()


def test_every_number_has_a_range():
    """A field that is added must say what it may be, in `config.ranges` or with the others."""
    unruled = {
        # any integer or finite number will do, or another check looks at it
        "algo.entropy_coef",
        *(f"mesh.{axis}" for axis in ("data", "fsdp", "tensor")),
    }
    ruled = {path for path, _, _ in ranges._rules()}

    def numbers(section, prefix=""):
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                yield from numbers(field.type, f"{prefix}{field.name}.")
            elif field.type in (int, float):
                yield f"{prefix}{field.name}"

    found = {path for path in numbers(Config) if ".judge." not in f".{path}"}
    assert found - ruled == unruled


@pytest.mark.parametrize(
    ("split", "message"), [("test", "look at what is reported"), ("train", "what is trained on")]
)
def test_validations_never_look_at_what_is_reported_or_trained_on(split, message):
    config = recipe(data__validation_split=split)
    config.validate()  # no validations
    config.train.eval_every = 5
    with pytest.raises(ValueError, match=message):
        config.validate()
    config.data.validation_split = "validation"
    config.validate()


@pytest.mark.parametrize(
    ("source", "scored", "is_refused"),
    [
        ("flowers:coop=f.json", ("cub", "flowers"), True),
        ("cub + 2*flowers", ("cub", "flowers:coop=f.json"), True),
        ("flowers:coop=f.json", ("flowers:coop=f.json",), False),
        ("cub + flowers", ("cub", "flowers", "food:coop=f.json"), False),
        ("field_guide_birds:seed=7", ("field_guide_birds:seed=8",), False),
    ],
)
def test_two_divisions_of_the_same_pictures_are_refused(source, scored, is_refused):
    """The official test images of Flowers are training images of a CoOp split."""
    config = recipe(data__source=source, data__eval_sources=scored)
    if is_refused:
        with pytest.raises(ValueError, match=r"divide the same pictures differently"):
            config.validate()
    else:
        config.validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo__name": "dapo"}, "algo.name=dapo with .* is GRPO by another name; recipes.set_alg"),
        ({"algo__name": "dapo", "algo__kl_coef": 0.0}, None),
        ({"algo__name": "dapo", "algo__clip_eps_high": 0.28}, None),
        (
            {"algo__name": "gspo", "algo__aggregation": "seq-mean-token-mean"},
            "algo.clip_eps_high=0.2: its ratio is that of a whole sequence",
        ),
        ({"algo__name": "grpo"}, None),
    ],
)
def test_a_name_without_its_algorithm_is_refused(changes, message):
    """A recipe that sets the name alone: on the command line the name brings its preset."""
    if message is None:
        recipe(**changes).validate()
        return
    with pytest.raises(ValueError, match=message):
        recipe(**changes).validate()
