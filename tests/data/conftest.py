"""A byte-level tokenizer and a small architecture of Qwen2.5-VL's shape, made on the spot."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config.schema import DataConfig
from speciarl_jax.data.images import ImageLimits
from speciarl_jax.data.loader import PromptLoader
from speciarl_jax.data.prompts import PromptBuilder, PromptTemplate
from speciarl_jax.types import Example

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The shape of Qwen2.5-VL's own template: default system turn, images as placeholders.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, with Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def arch(tokenizer: PreTrainedTokenizerFast) -> Arch:
    """Tiny widths, real patch, merge and window sizes."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    return Arch(
        vision=VisionArch(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            full_attention_blocks=(1,),
        ),
        text=TextArch(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            mrope_section=(2, 3, 3),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


@pytest.fixture(scope="session")
def limits() -> ImageLimits:
    """Down to a single merged token, up to 24 x 24 patches or so."""
    return ImageLimits(min_pixels=28 * 28, max_pixels=336 * 336)


@pytest.fixture(scope="session")
def template() -> PromptTemplate:
    """One short text."""
    return PromptTemplate("test", ("What is this?",))


@pytest.fixture(scope="session")
def builder(tokenizer, arch, limits, template) -> PromptBuilder:
    """A builder of short prompts."""
    return PromptBuilder(tokenizer, arch, limits, template)


@pytest.fixture(scope="session")
def noise_image():
    """Factory (width, height, seed=0, mode="RGB") of random pixels."""
    return _noise_image


@pytest.fixture(scope="session")
def encode():
    """Factory (image, kind="PNG", **options) of file bytes."""
    return _encode


def _noise_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random pixels."""
    rng = np.random.default_rng((seed, width, height))
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4, "LA": 2}[mode]
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode=None)


def _encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Image to file bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_examples():
    """Factory of n examples with images of varied sizes; `bad` indices are unreadable."""

    def make(count: int, bad: tuple[int, ...] = (), dataset: str = "toy") -> list[Example]:
        return [
            Example(
                image=b"not an image" if i in bad else _encode(_sized(i)),
                ground_truth=f"thing {i}",
                dataset=dataset,
                split="train",
                prompt_id=f"{dataset}/train/{i}",
                image_name=f"{i}.png",
            )
            for i in range(count)
        ]

    return make


def _sized(i: int) -> Image.Image:
    return _noise_image(28 + 14 * (i % 9), 30 + 11 * (i % 7), seed=i)


@pytest.fixture(scope="session")
def open_loader(tmp_path_factory):
    """Factory (source, builder, batch_size, **fields of DataConfig, **options of PromptLoader)."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    fields = {field.name for field in dataclasses.fields(DataConfig)}

    def open_(source, builder, batch_size, **options) -> PromptLoader:
        data = {name: options.pop(name) for name in fields & set(options)}
        config = DataConfig(data_dir=data_dir, **data)
        return PromptLoader(config, source, builder, batch_size, **options)

    return open_
