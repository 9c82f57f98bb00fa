"""What a run, an evaluation or a sampling session opens once: model, tokenizer, engine."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from speciarl_jax.arch import Arch
from speciarl_jax.config import Config, ModelConfig
from speciarl_jax.convert.loading import load_policy, resolve_checkpoint
from speciarl_jax.data.prompts import PromptBuilder
from speciarl_jax.data.recipe import make_builder
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, PolicyParts, split_policy
from speciarl_jax.policy.vision import encode_images
from speciarl_jax.rollout.engine import RolloutEngine, Vocabulary
from speciarl_jax.tiny import shipped_tiny_dir
from speciarl_jax.types import PromptBatch


@dataclasses.dataclass
class Session:
    """A loaded policy and what is needed to talk to it.

    Attributes:
        config: the recipe.
        model_dir: local directory of the base model.
        arch: its architecture.
        tokenizer: transformers tokenizer.
        vocabulary: stop ids, banned ids, detokenizer.
        builder: examples to prompts.
        parts: the policy taken apart; `trainable` is the starting point of training.
        engine: samples answers.
    """

    config: Config
    model_dir: pathlib.Path
    arch: Arch
    tokenizer: object
    vocabulary: Vocabulary
    builder: PromptBuilder
    parts: PolicyParts
    engine: RolloutEngine

    def encode(self, states: tuple[nnx.State, ...], batch: PromptBatch) -> Array:
        """Image embeddings of a batch, [I*M, D]; once per rollout batch."""
        vision = batch.vision
        return encode_images(
            self.parts.graphdef, states, vision.patches, vision.positions, vision.mask
        )


def open_session(config: Config, recipe_dir: pathlib.Path | None = None) -> Session:
    """Loads tokenizer and weights, adds the adapter, prepares prompts and sampling.

    Args:
        config: a validated recipe.
        recipe_dir: folder of the recipe, where its prompt files are looked for first.

    Raises:
        ValueError: no such model, or a checkpoint, tokenizer or prompt that does not fit it.
    """
    model_dir = find_model(config.model.path)
    arch = Arch.from_dir(model_dir)
    tokenizer = load_tokenizer(model_dir)
    policy = load_policy(model_dir, model_dtypes(config.model))
    if config.lora.rank and not config.model.train_base:
        add_lora(policy, config.lora, config.seed)
    return assemble_session(config, model_dir, arch, tokenizer, policy, recipe_dir)


def assemble_session(
    config: Config,
    model_dir: pathlib.Path,
    arch: Arch,
    tokenizer: object,
    policy: Policy,
    recipe_dir: pathlib.Path | None = None,
) -> Session:
    """Joins a policy that is already in memory with the rest."""
    vocabulary = make_vocabulary(tokenizer, arch, model_dir)
    parts = split_policy(
        policy, train_base=config.model.train_base, train_vision=config.model.train_vision
    )
    builder = make_builder(config.data, tokenizer, arch, model_dir, config.seed, recipe_dir)
    engine = RolloutEngine(parts.graphdef, config.rollout, vocabulary)
    return Session(config, model_dir, arch, tokenizer, vocabulary, builder, parts, engine)


def find_model(path: str) -> pathlib.Path:
    """The model's local directory; ``tiny`` is the small policy inside the package."""
    return shipped_tiny_dir() if path == "tiny" else resolve_checkpoint(path)


def model_dtypes(model: ModelConfig) -> Dtypes:
    """Storage and compute dtype of a recipe."""
    return Dtypes(jnp.dtype(model.param_dtype), jnp.dtype(model.compute_dtype))


def load_tokenizer(model_dir: pathlib.Path) -> object:
    """The model's own tokenizer.

    Raises:
        ValueError: the directory holds none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_dir}: no usable tokenizer ({error})") from error


def make_vocabulary(tokenizer: object, arch: Arch, model_dir: pathlib.Path) -> Vocabulary:
    """Stop ids from ``generation_config.json``; bans vision tokens and ids without a token.

    Raises:
        ValueError: the model names no stop token, or one that is not in the vocabulary.
    """
    stop_ids = _stop_ids(tokenizer, model_dir)
    size = arch.text.vocab_size
    if not stop_ids or max(stop_ids) >= size:
        raise ValueError(
            f"{model_dir}: stop ids {stop_ids} of generation_config.json, expected at least one, "
            f"all below vocab_size {size}"
        )
    banned = np.arange(size) >= len(tokenizer)
    vision_ids = (
        arch.image_token_id,
        arch.video_token_id,
        arch.vision_start_token_id,
        arch.vision_end_token_id,
    )
    banned[[token for token in vision_ids if token < size]] = True

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return Vocabulary(np.asarray(sorted(stop_ids), np.int32), banned, decode)


def _stop_ids(tokenizer: object, model_dir: pathlib.Path) -> set[int]:
    file = model_dir / "generation_config.json"
    stop: object = None
    if file.is_file():
        try:
            stop = json.loads(file.read_text()).get("eos_token_id")
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from error
    if stop is None:
        stop = tokenizer.eos_token_id
    if stop is None:
        return set()
    return {int(token) for token in (stop if isinstance(stop, list) else [stop])}
