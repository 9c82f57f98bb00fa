"""Which tokens may be sampled and which end an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from speciarl_jax.arch import Arch

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What sampling must know of the tokenizer.

    Attributes:
        stop_ids: [stops] int32 ids that end a completion.
        banned: [V] True for ids that must never be sampled: vision tokens and ids that the
            tokenizer does not have (the embedding table is padded beyond it).
        decode: token ids to text, special tokens left out.
    """

    stop_ids: np.ndarray
    banned: np.ndarray
    decode: Callable[[Sequence[int]], str]


NEG_INF = np.float32(-1e30)  # finite, so that 0 * NEG_INF is 0 and softmax of it is 0


def allowed_logits(
    logits: Float[Array, "... V"], banned: Bool[Array, " V"], temperature: float
) -> Float[Array, "... V"]:
    """Logits at a temperature with banned ids (vision tokens, ids beyond the tokenizer) removed.

    Sampler and trainer both go through here, so that their log-probabilities agree.
    """
    scale = np.float32(1.0 / temperature if temperature else 1.0)
    banned = jnp.reshape(banned, (1,) * (logits.ndim - 1) + banned.shape)
    return jnp.where(banned, NEG_INF, logits * scale)


def make_vocabulary(
    tokenizer: PreTrainedTokenizerBase, arch: Arch, stop_ids: set[int]
) -> Vocabulary:
    """Bans vision tokens and ids without a token; `stop_ids` are of ``generation_config.json``.

    Raises:
        ValueError: no stop token, or one that is not in the vocabulary.
    """
    size = arch.text.vocab_size
    if not stop_ids or max(stop_ids) >= size:
        raise ValueError(
            f"stop ids {stop_ids} of the model's generation_config.json: expected at least one, "
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
        text = tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str), text  # a list of texts only for a list of token lists
        return text

    return Vocabulary(np.asarray(sorted(stop_ids), np.int32), banned, decode)
