"""The small policy: real Qwen2.5-VL architecture, its own tokenizer, under 2 M parameters.

`make_tiny_dir` writes a Hugging Face directory with random weights; the recipe
``configs/tiny_sft.py`` warms it up (``make tiny``). The result ships in
``speciarl_jax/convert/tiny_policy/``.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from speciarl_jax.arch import Arch
from speciarl_jax.data.field_guide.answers import answer_text
from speciarl_jax.data.field_guide.specimens import WARMUP_CYCLE, draw_specimens
from speciarl_jax.data.field_guide.taxonomy import load_species
from speciarl_jax.files import read_json, write_whole
from speciarl_jax.types import JsonObject, JsonValue

PROMPTS = ("field_guide", "field_guide_exact")  # wordings that the warm-up teaches
MAX_VOCAB_SIZE = 1024  # the field guide's texts need fewer
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# config.json in the hub's flat style with tokens in place of ids; image settings of the released
# models at areas of 56 x 56 to 112 x 112 px; Qwen2.5-VL's chat layout in its plainest form.
TEMPLATE = pathlib.Path(__file__).parent / "tiny_template"


def tiny_config(tokenizer: Tokenizer) -> JsonObject:
    """``config.json`` of the small policy.

    Like the released models, the embedding table is padded beyond the tokenizer.
    """
    config: JsonObject = read_json(TEMPLATE / "config.json", "install the package again")
    ids = {k: tokenizer.token_to_id(v) for k, v in config.items() if v in SPECIAL_TOKENS}
    return config | ids | {"vocab_size": -(-(tokenizer.get_vocab_size() + 1) // 64) * 64}


def train_tokenizer(prompts: list[str], vocab_size: int = MAX_VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer of the field guide's texts, Qwen's special tokens at the end.

    It encodes `prompts` well; `vocab_size` is an upper bound, special tokens included.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits stay single, words keep their leading space, tags split off from words.
    split = Regex(r" ?[a-z]+|[A-Z][a-z]+|\d| ?[^\sa-zA-Z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(prompts), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _texts(prompts: list[str]) -> list[str]:
    answers = [
        answer_text(specimen, level)
        for domain in load_species()
        for specimen in draw_specimens(domain, "warmup", 48, cycle=WARMUP_CYCLE)
        for level in ("domain", "family", "genus", "species")
    ]
    turns = ["<|im_start|>", "system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    return [*answers, *(200 * (prompts + turns))]


def make_tiny_dir(out: pathlib.Path, prompts: list[str], seed: int = 0) -> None:
    """Writes the randomly initialised policy as a Hugging Face directory.

    `prompts` are wordings for the tokenizer; files that exist in `out` are overwritten.
    """
    from transformers import PreTrainedTokenizerFast

    from speciarl_jax.convert.export import save_hf
    from speciarl_jax.policy.layers import Dtypes
    from speciarl_jax.policy.model import Policy

    out.mkdir(parents=True, exist_ok=True)
    tokenizer_object = train_tokenizer(prompts)
    config = tiny_config(tokenizer_object)
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {"eos_token_id": [config["eos_token_id"], config["bos_token_id"]], "do_sample": False},
    )
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        write_whole(out / name, (TEMPLATE / name).read_bytes())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_object,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=(TEMPLATE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    tokenizer.save_pretrained(out)
    policy = Policy(Arch.from_hf(config), dtypes=Dtypes(), rngs=nnx.Rngs(seed))
    _scale_init(policy)
    save_hf(policy, out, out, dtype="bfloat16")


def _scale_init(policy: nnx.Module) -> None:
    """Widens the N(0, 0.02) kernels to 1/sqrt(fan-in): at width 128 the default learns slowly."""
    for _, module in nnx.iter_modules(policy):
        kernel = getattr(module, "kernel", None)
        if kernel is not None:
            fan_in = kernel.shape[-2]
            kernel[...] = kernel[...] * np.float32(1 / (0.02 * np.sqrt(fan_in)))


def _write_json(path: pathlib.Path, value: JsonValue) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


def shipped_tiny_dir() -> pathlib.Path:
    """The directory of the warmed-up policy inside the package.

    Raises:
        ValueError: this installation lacks it.
    """
    path = pathlib.Path(__file__).parent / "tiny_policy"
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: the small policy is missing; run `make tiny` to make it again")
    return path
