"""What a recipe needs of the world, asked before anything is paid for: the model is not loaded.

`Config.validate` is pure; here files are opened, a user's functions are imported and called on a
group that is made up, and the judge is asked whether it answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from speciarl_jax.arch import Arch
from speciarl_jax.config.dotted import USER_CODE_ERRORS, check_call
from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.config.schema import Config
from speciarl_jax.convert.loading import checkpoint_files
from speciarl_jax.convert.orbax_dir import is_converted
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.data.prompts import PromptTemplate
from speciarl_jax.data.recipe import open_eval_source, open_train_source, open_validation_source
from speciarl_jax.data.targets import resolve_target
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.objective import advantage, reward
from speciarl_jax.objective.reward import FORMAT_FAILURE, UNLABELLED
from speciarl_jax.types import Category

_JUDGE_ANSWERS_S = 60.0  # a judge that is just starting is waited for as long


def preflight(
    config: Config,
    workdir: pathlib.Path | str | None = None,
    recipe_dir: pathlib.Path | None = None,
) -> Iterator[str]:
    """Checks a recipe and what it names, cheapest first.

    Args:
        config: the recipe.
        workdir: where the run will be; nothing is left there. None, or an address of object
            storage, which the run's first file is written to before the model is loaded: not asked.
        recipe_dir: folder of the recipe, for its prompts.

    Yields:
        A line for each thing that is as it should be.

    Raises:
        ValueError: a setting, a path or a user's function is wrong; one line with the remedy.
        JudgeError: nobody answers.
    """
    config.validate()
    yield "recipe: every setting is in its range, none contradicts another"
    yield from check_own_code(config)
    if isinstance(workdir, pathlib.Path):
        check_writable(workdir)
        yield f"workdir: {workdir} can be written"
    template = PromptTemplate.load(config.data.prompt, recipe_dir)
    yield f"prompt: {config.data.prompt}, {len(template.texts)} text(s)"
    yield f"model: {check_model(config.model.path)}"
    yield f"data: {check_data(config)}"
    judges = {"judge": config.judge}
    if not config.eval.use_train_judge:
        judges["eval.judge"] = config.eval.judge
    for name, judge in judges.items():
        check_judge(judge)
        yield f"{name}: {judge.model or judge.kind} answers"


def check_own_code(config: Config) -> Iterator[str]:
    """Imports what the recipe names by dotted path, and tries rewards and advantages on one group.

    Yields:
        A line for each function.

    Raises:
        ValueError: it cannot be imported, takes other arguments, fails, or returns another shape or
            a value that is not finite.
    """
    algo, size = config.algo, config.rollout.group_size
    labels = [*Category, FORMAT_FAILURE, UNLABELLED]
    codes = np.array([[labels[i % len(labels)] for i in range(size)]], np.int64)
    if "." in algo.reward:
        check_call(algo.reward, "algo.reward", "codes")
        with _told("algo.reward", algo.reward):
            reward.rewards(algo.reward, codes)
        yield f"algo.reward: {algo.reward} rewards a group of {size}"
    if "." in algo.name:
        check_call(algo.name, "algo.name", "rewards, valid")
        with _told("algo.name", algo.name):
            values = np.arange(size, dtype=np.float64)[None]
            advantage.resolve(algo.name)(values, codes != UNLABELLED)
        yield f"algo.name: {algo.name} gives advantages to a group of {size}"
    if algo.name == "sft":
        target = config.train.sft_target
        if "." in target:
            check_call(target, "train.sft_target", "key, ground_truth, question, rng")
        resolve_target(target, config.data.source)
        yield f"train.sft_target: {target}"


@contextlib.contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    """An error of a user's function as one line that says whose it is."""
    try:
        yield
    except USER_CODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {path!r} fails on a group of answers: {reason}") from error


def check_writable(workdir: pathlib.Path) -> None:
    """Refuses a work directory that cannot be made or written; leaves nothing there.

    Raises:
        ValueError: names the folder that refuses.
    """
    place = workdir.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"--workdir={workdir}: {place} cannot be written ({error.strerror or error}); give "
            "another directory"
        ) from error


def check_model(path: str) -> str:
    """What a model's directory holds, from its small files; a hub id is not fetched.

    Raises:
        ValueError: a directory without a configuration or with missing weights.
    """
    directory = shipped_tiny_dir() if path == "tiny" else pathlib.Path(path)
    if not directory.is_dir():
        return f"{path} is no directory here; it is fetched from the hub when the run starts"
    arch = Arch.from_dir(directory)
    if not is_converted(directory):
        checkpoint_files(directory)
    return f"{path} has {arch.text.num_layers} layers of width {arch.text.hidden_size}"


def check_data(config: Config) -> str:
    """How many pictures the run will read; a field guide is drawn now if it is not there.

    Raises:
        ValueError: a source that is unknown, not built or too small.
    """
    data, settings = config.data, config.eval
    counts = [f"{len(open_train_source(data))} to train on"]
    if config.train.eval_every:
        number = sum(len(open_validation_source(data, name)) for name in data.eval_sources)
        counts.append(f"{number} for each validation")
    if settings.score_base or settings.score_trained or settings.best_of:
        opened = (
            open_eval_source(data, name, data.eval_split, data.num_eval)
            for name in data.eval_sources
        )
        counts.append(f"{sum(map(len, opened))} to score")
    return f"pictures: {', '.join(counts)}"


def check_judge(judge: JudgeConfig) -> None:
    """Starts a judge, asks it for a sign of life and ends it; a run's verdict log is not touched.

    Raises:
        JudgeError: nobody answers.
    """
    with JudgeThread(dataclasses.replace(judge, log_path="")) as thread:
        thread.check_health(_JUDGE_ANSWERS_S)
