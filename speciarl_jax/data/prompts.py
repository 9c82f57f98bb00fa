"""From an example to the policy's prompt: template, chat format, placeholders, ids.

image bytes + template text -> chat template -> tokens, each <|image_pad|> repeated M times
                            -> M-RoPE ids, resized pixels -> EncodedPrompt
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speciarl_jax.arch import Arch
from speciarl_jax.data.decode import decode_image
from speciarl_jax.data.images import ImageLimits, grid_of, num_windows, resize_image
from speciarl_jax.data.positions import mrope_positions
from speciarl_jax.types import Example

IMAGE_TOKEN = "<|image_pad|>"
_POOL_SEPARATOR = re.compile(r"^\s*---\s*$", re.MULTILINE)
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# In a checkout, and where setup.py installs the same files.
SHIPPED_PROMPTS = (_PACKAGE.parent / "configs" / "prompts", _PACKAGE / "prompts")


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts need."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> object:
        """Renders messages to text; transformers' own type leaves out messages with images."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to token ids."""

    def convert_tokens_to_ids(self, tokens: str) -> object:
        """Token to its id."""


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """What the user says about the image: one text, or a pool of them.

    Attributes:
        name: for logs and reports.
        texts: the pool; most templates hold one.
    """

    name: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses an empty pool, an empty text, and text that would fake an image."""
        if not self.texts or not all(self.texts):
            raise ValueError(
                f"prompt {self.name!r} has an empty text; write the question into the file"
            )
        if any("<|" in text for text in self.texts):
            raise ValueError(f"prompt {self.name!r} holds '<|': special tokens are added here")

    @classmethod
    def load(cls, name: str, recipe_dir: str | pathlib.Path | None = None) -> PromptTemplate:
        """Reads ``NAME.txt``, or a pool of several.

        Args:
            name: a path; or a file name without ``.txt``, looked for in ``recipe_dir/prompts``,
                ``configs/prompts`` under the working directory, then among those that ship with
                the package; or several of these joined by commas. A file may itself hold a
                pool, its texts parted by lines of ``---``.
            recipe_dir: folder of the recipe file, if there is one.

        Raises:
            ValueError: no such file (the message lists the places), or an empty text.
        """
        texts: list[str] = []
        for part in filter(None, (piece.strip() for piece in name.split(","))):
            content = _find_prompt(part, recipe_dir).read_text(encoding="utf-8")
            texts += [text.strip() for text in _POOL_SEPARATOR.split(content.strip())]
        return cls(name, tuple(texts))

    def pick(self, seed: int, prompt_id: str, epoch: int = 0) -> str:
        """One text of the pool, the same for the same arguments on every machine."""
        if len(self.texts) == 1:
            return self.texts[0]
        key = f"{seed}/{epoch}/{prompt_id}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
        return self.texts[number % len(self.texts)]


def _find_prompt(name: str, recipe_dir: str | pathlib.Path | None) -> pathlib.Path:
    places = [pathlib.Path(name)] if name.endswith(".txt") or "/" in name else []
    if not places:
        folders = [pathlib.Path("configs/prompts"), *SHIPPED_PROMPTS]
        if recipe_dir is not None:
            folders.insert(0, pathlib.Path(recipe_dir) / "prompts")
        places = [folder / f"{name}.txt" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(str(place) for place in places)
    raise ValueError(f"data.prompt={name!r}: no such prompt file; looked for {tried}")


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, ready to be padded into a batch.

    Attributes:
        prompt_id, ground_truth, dataset: of its example.
        tokens: [S] int32, placeholders expanded.
        longest_tokens: S of the longest text in the prompt pool; batches are padded for that one,
            so that shapes do not depend on the draw.
        positions: [3, S] int32 M-RoPE ids.
        delta: position delta of the completion.
        images: encoded bytes as they came.
        pixels: resized images, each [h, w, 3] uint8.
    """

    prompt_id: str
    ground_truth: str
    dataset: str
    tokens: np.ndarray
    longest_tokens: int
    positions: np.ndarray
    delta: int
    images: tuple[bytes, ...]
    pixels: tuple[np.ndarray, ...]


class PromptBuilder:
    """Encodes examples for one tokenizer, architecture and template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        arch: Arch,
        limits: ImageLimits,
        template: PromptTemplate,
        seed: int = 0,
    ) -> None:
        """Renders every text of the template once; `seed` is of the draw from a prompt pool.

        Raises:
            ValueError: the tokenizer has no chat template, its template leaves the image out, or
                its placeholder has another id than the architecture says.
        """
        self.tokenizer = tokenizer
        self.arch = arch
        self.limits = limits
        self.template = template
        self.seed = seed
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat_template; use the model's own directory")
        token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if token_id != arch.image_token_id:
            raise ValueError(
                f"tokenizer gives {IMAGE_TOKEN} the id {token_id}, config.json says "
                f"{arch.image_token_id}: tokenizer and model do not belong together"
            )
        self._tokens: dict[tuple[str, int], np.ndarray] = {}
        for text in template.texts:
            self._template_tokens(text, 1)

    def render(self, text: str, num_images: int = 1) -> str:
        """Chat text: default system turn, user turn with images first, assistant header."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
        content.append({"type": "text", "text": text})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _template_tokens(self, text: str, num_images: int) -> np.ndarray:
        key = (text, num_images)
        if key not in self._tokens:
            ids = self.tokenizer.encode(self.render(text, num_images), add_special_tokens=False)
            tokens = np.asarray(ids, np.int32)
            found = int((tokens == self.arch.image_token_id).sum())
            if found != num_images:
                raise ValueError(
                    f"the chat template renders {found} image placeholders for {num_images} images;"
                    " use the chat template of a Qwen2.5-VL model"
                )
            self._tokens[key] = tokens
        return self._tokens[key]

    def tokens_for(self, text: str, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """[S] int32: the rendered prompt with the i-th placeholder repeated for the i-th grid.

        Raises:
            ValueError: the chat template leaves images out.
        """
        tokens = self._template_tokens(text, len(grids))
        is_image = tokens == self.arch.image_token_id
        repeats = np.ones(len(tokens), np.int64)
        repeats[is_image] = [g[1] * g[2] // self.arch.vision.merge_unit for g in grids]
        return np.repeat(tokens, repeats)

    def read_pixels(self, image: bytes) -> np.ndarray:
        """Decoded and resized image, [h, w, 3] uint8.

        Raises:
            BadImageError: unreadable, or of impossible size.
        """
        return resize_image(decode_image(image), self.arch.vision, self.limits)

    def encode(
        self, example: Example, pixels: np.ndarray | None = None, epoch: int = 0
    ) -> EncodedPrompt:
        """Encodes an example, from its resized image if the caller kept that.

        The epoch takes part in the draw from a prompt pool.

        Raises:
            BadImageError: unreadable image.
        """
        kept = (self.read_pixels(example.image),) if pixels is None else (pixels,)
        text = self.template.pick(self.seed, example.prompt_id, epoch)
        return self._assemble(example, (example.image,), kept, text)

    def encode_images(
        self, images: Sequence[bytes], text: str | None = None, name: str = "image"
    ) -> EncodedPrompt:
        """Encodes a prompt that belongs to no data set, with any number of images (encoded bytes).

        The question is `text`, or the template's first; `name` becomes the prompt id.

        Raises:
            BadImageError: unreadable image.
        """
        example = Example(images[0] if images else b"", "", "", "", name, name)
        pixels = tuple(self.read_pixels(image) for image in images)
        return self._assemble(example, tuple(images), pixels, text or self.template.texts[0])

    def _assemble(
        self,
        example: Example,
        images: tuple[bytes, ...],
        pixels: tuple[np.ndarray, ...],
        text: str,
    ) -> EncodedPrompt:
        grids = [grid_of(image, self.arch.vision) for image in pixels]
        tokens = self.tokens_for(text, grids)
        positions, delta = mrope_positions(tokens, grids, self.arch)
        return EncodedPrompt(
            prompt_id=example.prompt_id,
            ground_truth=example.ground_truth,
            dataset=example.dataset,
            tokens=tokens,
            longest_tokens=max(self._longest_tokens(grids), len(tokens)),
            positions=positions,
            delta=delta,
            images=images,
            pixels=pixels,
        )

    def size_of(self, pixels: np.ndarray) -> tuple[int, int]:
        """(tokens of the longest prompt over the pool, windows) for one resized image."""
        grid = grid_of(pixels, self.arch.vision)
        return self._longest_tokens([grid]), num_windows(grid, self.arch.vision)

    def _longest_tokens(self, grids: Sequence[tuple[int, int, int]]) -> int:
        texts = self.template.texts
        longest = max(len(self._template_tokens(text, len(grids))) for text in texts)
        return longest + sum(g[1] * g[2] // self.arch.vision.merge_unit - 1 for g in grids)

    def fingerprint(self) -> str:
        """Hash of everything that decides how long a prompt gets and which images are readable."""
        parts = [self.limits, self.arch.vision, self.arch.image_token_id, self.template.texts]
        lengths = [len(self.tokens_for(text, [])) for text in self.template.texts]
        return hashlib.sha256(repr([*parts, lengths]).encode()).hexdigest()[:16]
