"""Every row of the README's table of the paper loads, in both sizes."""

import pathlib
import re

import pytest

from speciarl_jax.cli import load_recipe

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "baselines.py"
ROWS = re.findall(r"^\| .*?`(row=[^`]+)`", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)


def load(argument):
    config, _ = load_recipe(f"{RECIPE}:{argument}", [])
    config.validate()
    return config


def test_readme_names_every_row_of_the_paper():
    expected = {"zero_shot", "be_specific", "best_of_64", "sft", "binary", "speciarl"}
    expected |= {"scale1", "scale2", "scale3"}
    assert {row.split(",")[0].removeprefix("row=") for row in ROWS} == expected
    asked = {part for row in ROWS for part in row.split(",")[1:]}
    for name, values in {
        "algo": ("dr_grpo", "dapo", "dapo_dynamic"),
        "n": ("5", "15"),
        "noise": ("0.05", "0.10", "0.25"),
        "images": ("128", "1024", "2048"),
        "train": ("aircraft", "flowers", "food", "pets", "mixed"),
    }.items():
        assert {f"{name}={value}" for value in values} <= asked


@pytest.mark.parametrize("row", ROWS)
def test_row_is_a_valid_recipe_in_both_sizes(row):
    full = load(row)
    assert full.model.path == "Qwen/Qwen2.5-VL-7B-Instruct"
    if row == "row=speciarl,train=food":
        with pytest.raises(ValueError, match="train=food,tiny: not in the field guide"):
            load(f"{row},tiny")
        return
    tiny = load(f"{row},tiny")
    assert tiny.model.path == "tiny"
    for field in ("name", "reward", "label_noise", "norm_by_std", "kl_coef", "clip_eps_high"):
        assert getattr(tiny.algo, field) == getattr(full.algo, field), field
    assert tiny.rollout.group_size == full.rollout.group_size
    is_trained = row.split("=")[1].split(",")[0] not in ("zero_shot", "be_specific", "best_of_64")
    assert (full.train.num_steps > 0) == (tiny.train.num_steps > 0) == is_trained


def test_numbers_of_the_paper():
    assert load("row=speciarl").train.num_steps == 165
    assert load("row=speciarl,algo=dapo").algo.overlong_buffer_tokens == 512
    assert load("row=speciarl,algo=dapo,tiny").algo.overlong_buffer_tokens == 12
    assert load("row=speciarl,algo=dapo_dynamic").algo.generation_prompts == 768
    small = load("row=speciarl,images=128")
    assert (small.data.num_train, small.train.prompts_per_step) == (128, 128)
    assert small.train.num_steps == 15
    assert load("row=speciarl,images=1024").train.num_steps == 60
    best = load("row=best_of_64").eval
    assert (best.best_of, best.best_of_temperature, best.best_of_top_p) == (64, 0.6, 0.95)
    mixed = load("row=speciarl,train=mixed").data
    assert (len(mixed.source.split(" + ")), mixed.num_train) == (6, 3000)
    assert load("row=zero_shot").data.prompt == "plain"
    assert load("row=be_specific").data.prompt == "specific"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("row=none", "row=none: expected one of zero_shot"),
        ("row=sft,algo=dapo", "row=sft: samples no rollouts"),
        ("row=speciarl,algo=ppo", "algo=ppo: expected one of grpo, dr_grpo, dapo"),
        ("row=speciarl,algo=grpo_dynamic", "algo=grpo_dynamic: expected one of"),
        ("row=speciarl,train=moon", "train=moon: expected one of cub"),
        ("small", "expected key=value"),
    ],
)
def test_bad_arguments_are_named(argument, expected):
    with pytest.raises(ValueError, match=expected):
        load(argument)
