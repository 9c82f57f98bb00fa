"""Every row of the evidence loads, in both sizes, and the README's are among them."""

import pathlib
import re

import pytest

from speciarl_jax.config import recipes
from speciarl_jax.config.recipes import load_recipe
from tests.evidence import rows as evidence

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "baselines.py"
ROWS = [*(row.argument for row in evidence.ROWS), "row=speciarl,train=food"]


def load(argument):
    config, _ = load_recipe(f"{RECIPE}:{argument}", [])
    config.validate()
    return config


def test_rows_of_the_readme_are_rows_of_the_evidence():
    readme = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"^\| .*?`(row=[^`]+)`", readme, re.MULTILINE)
    assert len(named) == 4
    assert set(named) <= set(ROWS)


def test_evidence_has_every_row_of_the_paper():
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


PAPERS = ["7b_cub", "7b_v5e", "7b_v5p", "7b_v6e", "32b_v5p", "72b_v5p"]


@pytest.mark.parametrize("file", [*(f"qwen2_5_vl_{name}.py" for name in PAPERS), "baselines.py"])
def test_the_papers_runs_are_scored_by_the_papers_judge(file):
    config, _ = load_recipe(str(ROOT / "configs" / file), [])
    config.validate()
    assert config.judge.model.startswith("Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert not config.eval.use_train_judge
    assert config.eval.judge.model == "meta-llama/Meta-Llama-3-70B-Instruct"
    assert config.eval.judge.kind == "endpoint"
    assert set(config.eval.judge.endpoints).isdisjoint(config.judge.endpoints)


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


SMOKE = str(ROOT / "configs" / "cpu_smoke.py")


def overridden(recipe, *words):
    config, _ = load_recipe(recipe, [f"--config.{word}" for word in words])
    config.validate()
    return config


@pytest.mark.parametrize("name", recipes.ALGORITHMS)
@pytest.mark.parametrize("own", ["grpo", "dr_grpo", "dapo_dynamic"])
def test_an_algorithm_by_override_is_the_one_by_argument(name, own, capsys):
    by_argument = overridden(f"{SMOKE}:algo={name}")
    capsys.readouterr()
    assert overridden(f"{SMOKE}:algo={own}", f"algo.name={name}") == by_argument
    assert len(capsys.readouterr().err.splitlines()) == (name != own)


def test_presets_by_hand(capsys):
    dapo = overridden(SMOKE, "algo.name=dapo").algo
    assert (dapo.kl_coef, dapo.clip_eps_high, dapo.clip_dual) == (0.0, 0.28, 10.0)
    assert dapo.overlong_buffer_tokens == 12
    assert capsys.readouterr().err == (
        "algo.name=dapo sets in algo: kl_coef=0.0, clip_eps_high=0.28, clip_dual=10.0, "
        "overlong_buffer_tokens=12\n"
    )
    doctor = overridden(SMOKE, "algo.name=dr_grpo").algo
    assert (doctor.kl_coef, doctor.norm_by_std) == (0.0, False)
    assert doctor.aggregation == "seq-mean-token-sum-norm"
    gspo = overridden(SMOKE, "algo.name=gspo").algo
    assert (gspo.clip_eps_low, gspo.clip_eps_high, gspo.clip_dual) == (3e-4, 4e-4, 0.0)
    assert (gspo.kl_coef, gspo.aggregation) == (0.0, "seq-mean-token-mean")
    rloo = overridden(SMOKE, "algo.name=rloo").algo
    assert (rloo.norm_by_std, rloo.kl_coef, rloo.clip_eps_low) == (False, 0.01, 0.2)
    dynamic = overridden(SMOKE, "algo.name=dapo_dynamic").algo
    assert (dynamic.name, dynamic.dynamic_sampling) == ("dapo", True)
    assert dynamic.generation_prompts == 48


def test_other_overrides_win_over_the_preset_in_any_order(capsys):
    words = ["algo.kl_coef=0.5", "algo.name=dapo", "rollout.max_completion_tokens=100"]
    first, last = overridden(SMOKE, *words), overridden(SMOKE, *reversed(words))
    assert first == last
    assert (first.algo.name, first.algo.kl_coef, first.algo.clip_eps_high) == ("dapo", 0.5, 0.28)
    assert first.algo.overlong_buffer_tokens == 25  # a quarter of the limit of this run
    assert "kl_coef" not in capsys.readouterr().err


def test_what_a_recipe_sets_by_itself_survives_another_algorithm(tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_text(
        "from speciarl_jax.config import Config\n\n\n"
        "def get_config(arg=None):\n"
        "    config = Config()\n"
        "    config.algo.kl_coef = 0.02\n"
        "    return config\n"
    )
    assert overridden(str(recipe), "algo.name=rloo").algo.kl_coef == 0.02
    assert overridden(str(recipe), "algo.name=grpo").algo.kl_coef == 0.02
    assert overridden(str(recipe), "algo.name=gspo").algo.kl_coef == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo.name=dr_grpo", "algo.norm_by_std=true"], "dr_grpo never divides .*=false"),
        (["algo.name=rloo", "algo.norm_by_std=true"], "rloo never divides .*=false"),
        (["algo.name=dr_grpo", "algo.aggregation=token-mean"], "=seq-mean-token-sum-norm"),
        (["algo.name=gspo", "algo.aggregation=token-mean"], "set .*=seq-mean-token-mean"),
        (["algo.name=ppo"], "algo.name='ppo': expected one of grpo"),
    ],
)
def test_what_contradicts_an_algorithm_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        overridden(SMOKE, *words)


# --- recipes and overrides with a fault ----------------------------------------------------------

HEAD = "from speciarl_jax import config as schema\n\n\n"
BODY = HEAD + "def get_config(arg=None):\n    c = schema.Config()\n    {}\n    return c\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(arg=None)\n    return 1\n", "line 1: SyntaxError: expected ':'"),
        ("x = undefined\n", "line 1: NameError: name 'undefined' is not defined"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),  # else: exit 0, and nothing done
        ("", "has no get_config"),
        ("get_config = 3\n", "TypeError: 'int' object is not callable"),
        ("def get_config(arg=None):\n    return {}['a']\n", "line 2: KeyError: 'a'"),
        ("def get_config(arg=None):\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def get_config(arg=None):\n    return {'a': 1}\n", "get_config returned dict; expected"),
        (BODY.format("c.trian.num_steps = 3"), "line 6: AttributeError: .* no attribute 'trian'"),
        (BODY.format("c.train.num_step = 3"), "train.num_step: no such field; did you mean train."),
        (BODY.format("c.judge.endpoints = 'http://a/v1'"), "judge.endpoints='http://a/v1': expec"),
        (BODY.format("c.optim = None"), "optim=None: expected a OptimConfig"),
        (
            BODY.format("c.optim.learning_rate = '1e-4'"),
            "optim.learning_rate=.*: expected float, got str",
        ),
        (BODY.format("raise RuntimeError('two\\nlines')"), "line 6: RuntimeError: two"),
    ],
)
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_recipe_with_a_fault_is_named_with_its_line(
    tmp_path, monkeypatch, text, message, is_relative
):
    recipe = tmp_path / "own.py"
    recipe.write_text(text)
    monkeypatch.chdir(tmp_path)
    path = "own.py" if is_relative else str(recipe)
    with pytest.raises(ValueError, match=rf"^(--config=)?{re.escape(path)}[:,] {message}"):
        load_recipe(path, [])


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"own.py, line 1: SyntaxError"):
        load_recipe(str(recipe), [])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.num_step=5", "train.num_step: no such field; did you mean train.num_steps"),
        ("trian.num_steps=5", "trian.num_steps: no such field; did you mean train.num_steps?"),
        ("eval.judge.modle=x", "no such field; did you mean eval.judge.mode or eval.judge.model?"),
        ("zzz=5", "zzz: no such field$"),
        ("train=5", "train: is a section; set one of its fields: num_steps, "),
        ("train.num_steps.x=5", "train.num_steps.x: no such field; train.num_steps is"),
        ("data.eval_sources[0]=cub", r"did you mean data.eval_sources\?"),
        ("=5", "no such field"),
        ("", "no such field"),
        ("__class__=3", "no such field"),
        ("train.num_steps", "Missing value"),
        ("train.num_steps=5.5", "invalid literal for int"),
        ("data.prompt_buckets=(1,", "Error while parsing string"),
        ("judge.has_cascade=maybe", "Non-boolean argument"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan: expected a finite number"),
    ],
)
def test_an_override_with_a_fault_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SMOKE, [f"--config.{word}"])
