"""From a recipe's data section to sources and a prompt builder."""

from __future__ import annotations

import pathlib

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.images import ImageLimits
from speciarl_jax.data.index import Source
from speciarl_jax.data.prompts import PromptBuilder, PromptTemplate, Tokenizer
from speciarl_jax.data.sources.catalog import open_source
from speciarl_jax.data.sources.selection import Selection, open_selected, parse_mixture
from speciarl_jax.errors import NoSuchSplit


def open_train_source(data: DataConfig) -> Source:
    """The examples to train on, without those that validations hold out of them.

    Raises:
        ValueError: see `selection.open_selected`.
    """
    parts = [name for _, name in parse_mixture(data.source)]
    held_out = {name: count for name in parts if (count := num_held_out(data, name))}
    selection = Selection(
        count=data.num_train,
        include_classes=tuple(data.include_classes),
        exclude_classes=tuple(data.exclude_classes),
        seed=data.select_seed,
    )
    return open_selected(data.source, data.split, data.data_dir, selection, held_out)


def num_held_out(data: DataConfig, name: str) -> int:
    """Pictures of a source's training split that validations take: of sources without their own.

    A source that has the split ``data.validation_split`` is validated on that one and gives all of
    its training split to training.
    """
    if not data.num_validation:
        return 0
    try:
        open_source(name, data.validation_split, data.data_dir)
    except NoSuchSplit:
        return data.num_validation
    return 0


def open_validation_source(data: DataConfig, name: str) -> Source:
    """The validation pictures of one evaluation source, which neither trains nor is reported.

    Its own validation split, or else ``data.num_validation`` pictures held out of ``data.split``:
    the same for a ``data.select_seed``, whatever else the recipe says.

    Raises:
        ValueError: it has no validation split and nothing is held out; or see
            `selection.open_selected`.
    """
    count = num_held_out(data, name)
    if count:
        selection = Selection(seed=data.select_seed, held_out=count, takes_held_out=True)
        return open_selected(name, data.split, data.data_dir, selection)
    try:
        return open_eval_source(data, name, data.validation_split, data.num_validation)
    except NoSuchSplit as error:
        raise ValueError(
            f"{error}; set data.num_validation to hold that many pictures of split {data.split!r} "
            "out of training, or train.eval_every=0"
        ) from error


def open_eval_source(data: DataConfig, name: str, split: str, count: int) -> Source:
    """The examples of one evaluation source: a fixed subset of `count`, or all if fewer or 0.

    Raises:
        ValueError: see `selection.open_selected`.
    """
    source = open_selected(name, split, data.data_dir, Selection())
    if not 0 < count < len(source):
        return source
    return open_selected(name, split, data.data_dir, Selection(count, seed=data.select_seed))


def make_builder(
    data: DataConfig,
    tokenizer: Tokenizer,
    arch: Arch,
    model_dir: str | pathlib.Path,
    seed: int = 0,
    recipe_dir: str | pathlib.Path | None = None,
) -> PromptBuilder:
    """A prompt builder for a recipe and a model directory.

    Raises:
        ValueError: see `PromptTemplate.load`, `ImageLimits.from_dir`, `PromptBuilder`.
    """
    limits = ImageLimits.from_dir(model_dir, arch.vision)
    return PromptBuilder(
        tokenizer,
        arch,
        limits.override(data.min_pixels, data.max_pixels),
        PromptTemplate.load(data.prompt, recipe_dir),
        seed,
    )
