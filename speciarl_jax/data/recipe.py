"""From a recipe's data section to sources and a prompt builder."""

from __future__ import annotations

import pathlib

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.images import ImageLimits
from speciarl_jax.data.index import Source
from speciarl_jax.data.prompts import PromptBuilder, PromptTemplate, Tokenizer
from speciarl_jax.data.sources.selection import Selection, open_selected


def open_train_source(data: DataConfig) -> Source:
    """The examples to train on.

    Raises:
        ValueError: see `selection.open_selected`.
    """
    selection = Selection(
        count=data.num_train,
        include_classes=tuple(data.include_classes),
        exclude_classes=tuple(data.exclude_classes),
        seed=data.select_seed,
    )
    return open_selected(data.source, data.split, data.data_dir, selection)


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
