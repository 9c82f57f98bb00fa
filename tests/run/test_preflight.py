"""What a recipe needs of the world is asked before the model is loaded, and told in one line."""

import pathlib
import shutil

import pytest

from speciarl_jax.cli.main import main
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.errors import JudgeError
from speciarl_jax.run import preflight as asked
from speciarl_jax.run.preflight import preflight
from tests.support.training import free_port, small_config

ROOT = pathlib.Path(__file__).parents[2]
OWN = """
import numpy as np

def reward(codes):
    return np.where(codes > 2, 1.0, 0.0)

def advantage(rewards, valid):
    return rewards - rewards.mean(axis=1, keepdims=True)

def target(key, truth, question, rng):
    return truth

def one_each(codes):
    return np.zeros(codes.shape[1])

def not_a_number(codes):
    return codes * np.nan

def fails(codes):
    return codes[:, 99]

def wants_more(codes, truths):
    return codes
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "k3_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def lines(config, **kwargs):
    return list(preflight(config, **kwargs))


def test_a_recipe_that_would_run_says_what_it_found(tmp_path):
    workdir = tmp_path / "not" / "there"
    config = small_config(train__eval_every=1, data__num_validation=5)
    found = "\n".join(lines(config, workdir=workdir))
    assert "24 to train on, 5 for each validation, 8 to score" in found
    assert f"{workdir} can be written" in found
    assert found.splitlines()[-1] == "judge: taxonomy answers"
    assert not workdir.parent.exists()


@pytest.mark.usefixtures("own")
def test_a_users_functions_are_tried():
    config = small_config(algo__reward="k3_own.reward", algo__name="k3_own.advantage")
    assert [line.partition(":")[0] for line in asked.check_own_code(config)] == [
        "algo.reward",
        "algo.name",
    ]
    config = small_config(algo__name="sft", train__sft_target="k3_own.target")
    assert list(asked.check_own_code(config)) == ["train.sft_target: k3_own.target"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo__reward": "k3_own.none"}, "k3_own has no function 'none'"),
        ({"algo__reward": "k3_nowhere.reward"}, "ModuleNotFoundError"),
        ({"algo__reward": "k3_own.wants_more"}, r"missing .*'truths'; expected .*\(codes\)"),
        ({"algo__reward": "k3_own.one_each"}, r"returned shape \(4,\), expected \(1, 4\)"),
        ({"algo__reward": "k3_own.not_a_number"}, "not finite"),
        ({"algo__reward": "k3_own.fails"}, "fails on a group of answers: IndexError"),
        ({"algo__name": "k3_own.reward"}, r"too many .*\(rewards, valid\), got \(codes\)"),
        (
            {"algo__name": "sft", "train__sft_target": "k3_own.reward"},
            "expected a function of .key",
        ),
        ({"algo__name": "sft", "train__sft_target": "moon"}, "expected answer, field_guide or"),
        ({"data__source": "moon"}, "data source 'moon' is unknown"),
        ({"data__num_train": 99}, "selection of 99 examples: only 24"),
        ({"data__eval_sources": ("folder:/nowhere",)}, "no such file or folder"),
        ({"data__prompt": "/nowhere.txt"}, "nowhere.txt"),
        ({"optim__learning_rate": 0.0}, "optim.learning_rate=0.0"),
        ({"judge__taxonomy": str(ROOT / "pyproject.toml")}, "pyproject.toml"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_is_wrong_is_one_line(changes, message):
    with pytest.raises((ValueError, JudgeError), match=message) as found:
        lines(small_config(**changes))
    assert "\n" not in str(found.value)


def test_a_directory_without_a_model_is_named():
    config = small_config()
    config.model.path = str(ROOT)
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        lines(config)


@pytest.mark.parametrize("workdir", ["/proc/run", "/etc/passwd/run", "/etc/passwd"])
def test_a_work_directory_that_cannot_be_written_is_named(workdir):
    """The tests may run as root, to whom folders without the right to write are writable."""
    with pytest.raises(ValueError, match=rf"--workdir={workdir}: /.* cannot be written"):
        lines(small_config(), workdir=pathlib.Path(workdir))


def test_a_judge_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(asked, "_JUDGE_ANSWERS_S", 0.5)
    url = f"http://127.0.0.1:{free_port()}/v1"
    config = small_config(judge__kind="endpoint", judge__model="m", judge__endpoints=(url,))
    with pytest.raises(JudgeError, match=f"judge does not answer .{url}"):
        lines(config)


def recipe_of(tmp_path, model):
    file = tmp_path / "own_recipe.py"
    file.write_text(
        "from tests.support.training import small_config\n\n\n"
        "def get_config(arg=None):\n"
        "    config = small_config()\n"
        f"    config.model.path = {str(model)!r}\n"
        "    return config\n"
    )
    return file


def test_train_asks_before_it_loads_the_model(tmp_path, capsys):
    """Weights that cannot be read: the error is still the reward's, and no run is begun."""
    model = tmp_path / "model"
    shutil.copytree(shipped_tiny_dir(), model)
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(b"nothing")
    recipe, workdir = recipe_of(tmp_path, model), tmp_path / "run"
    words = [f"--config={recipe}", "--config.algo.reward=k3_nowhere.reward"]
    for verb in ("check", "train"):
        assert main([verb, *words, f"--workdir={workdir}"]) == 2
        assert "algo.reward 'k3_nowhere.reward'" in capsys.readouterr().err
        assert not workdir.exists()
    assert main(["check", words[0], f"--workdir={workdir}"]) == 0
    assert "judge: taxonomy answers" in capsys.readouterr().out
