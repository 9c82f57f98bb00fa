"""Prompts with the real Qwen2.5 vocabulary, where it is at hand.

It comes with the PyPI package ``dashscope`` (file ``qwen.tiktoken``), or from a directory named by
the environment variable SPECIARL_QWEN_TOKENIZER (``tokenizer.json``); without both these tests are
skipped.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import itertools
import os
import pathlib

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speciarl_jax.data.prompts import PromptBuilder, PromptTemplate

pytestmark = pytest.mark.slow

SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    extra = (b for b in range(256) if b not in letters)
    return letters | {byte: chr(256 + n) for n, byte in enumerate(extra)}


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge makes `token`: merge by rank until two are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _from_tiktoken(file: pathlib.Path) -> Tokenizer:
    rows = [line.split() for line in file.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [_halves(token, ranks) for token in ranks if len(token) > 1]
    core = Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(a), spell(b)) for a, b in merges],
        )
    )
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return core


@pytest.fixture(scope="module")
def qwen(tokenizer):
    folder = os.environ.get("SPECIARL_QWEN_TOKENIZER", "")
    spec = importlib.util.find_spec("dashscope")
    if folder:
        core = Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
    elif spec and spec.submodule_search_locations:
        root = pathlib.Path(spec.submodule_search_locations[0])
        core = _from_tiktoken(root / "resources" / "qwen.tiktoken")
    else:
        pytest.skip("no Qwen vocabulary: pip install dashscope, or set SPECIARL_QWEN_TOKENIZER")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=tokenizer.chat_template
    )


@pytest.fixture(scope="module")
def qwen_arch(arch):
    return dataclasses.replace(
        arch,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def test_special_and_stop_ids(qwen):
    for token, number in SPECIALS.items():
        assert qwen.convert_tokens_to_ids(token) == number
        assert qwen.encode(token, add_special_tokens=False) == [number]
    assert qwen.eos_token_id == 151645


def test_known_ids(qwen):
    """The chat frame of every Qwen2.5 prompt."""
    frame = qwen.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert frame == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]


@pytest.mark.parametrize("name", ["plain", "specific"])
def test_prompts_of_the_package(name, qwen, qwen_arch, limits, noise_image, encode):
    builder = PromptBuilder(qwen, qwen_arch, limits, PromptTemplate.load(name))
    prompt = builder.encode_images([encode(noise_image(300, 120))])
    merged = prompt.pixels[0].shape[0] * prompt.pixels[0].shape[1] // 28**2
    places = np.flatnonzero(prompt.tokens == 151655)
    assert len(places) == merged
    assert prompt.tokens[places[0] - 1] == 151652
    assert prompt.tokens[places[-1] + 1] == 151653
    assert prompt.tokens[-3:].tolist() == [151644, 77091, 198]
    text = qwen.decode(np.delete(prompt.tokens, places[1:]))
    assert text == builder.render(builder.template.texts[0])
    assert len(prompt.tokens) - merged < 160
