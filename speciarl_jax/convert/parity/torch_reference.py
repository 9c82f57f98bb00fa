"""transformers' own Qwen2.5-VL on torch, in float32 with eager attention, with its activations.

torch and transformers are imported when a `TorchReference` is made, not before.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from speciarl_jax.convert.parity.activations import (
    DECODER_LAYERS,
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    MERGER,
    PATCH_EMBED,
    VISION_BLOCKS,
)
from speciarl_jax.data.decode import FORMATS
from speciarl_jax.data.prompts import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle
    from transformers import Qwen2_5_VLForConditionalGeneration as TorchModel

    Inputs: TypeAlias = dict[str, Tensor]
else:  # torch is optional
    Module = RemovableHandle = Tensor = TorchModel = object
    Inputs = dict

IMAGE_EMBEDS = "vision/image_embeds"


def capture_activations(model: TorchModel, inputs: Inputs) -> dict[str, np.ndarray]:
    """Runs the torch model once with keyword arguments and returns every component's output.

    Names are those of `convert.parity.activations`, blocks are stacked; vision rows stand as
    transformers holds them (patch embedding in raster, blocks and merger in window order), those of
    ``vision/image_embeds`` in raster order.
    """
    import torch

    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str, tensor: Tensor) -> None:
        found.setdefault(name, []).append(tensor.detach().float().numpy().copy())

    def record(name: str, module: Module) -> RemovableHandle:
        def hook(_module: Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            keep(name, output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(hook)

    visual, text = model.model.visual, model.model.language_model
    with contextlib.ExitStack() as hooks:
        for name, modules in (
            (PATCH_EMBED, [visual.patch_embed]),
            (VISION_BLOCKS, visual.blocks),
            (MERGER, [visual.merger]),
            (DECODER_LAYERS, text.layers),
            (FINAL_NORM, [text.norm]),
        ):
            for module in modules:
                hooks.callback(record(name, module).remove)
        first = text.layers[0].register_forward_pre_hook(
            lambda _, args, more: keep(EMBEDDING, args[0] if args else more["hidden_states"]),
            with_kwargs=True,
        )
        hooks.callback(first.remove)
        with torch.no_grad():
            output = model(**inputs, use_cache=False)
            if "pixel_values" in inputs:
                vision = visual(inputs["pixel_values"], inputs["image_grid_thw"])
                keep(IMAGE_EMBEDS, vision.pooler_output)
    keep(LOGITS, output.logits)
    stacks = {VISION_BLOCKS: len(visual.blocks), DECODER_LAYERS: len(text.layers)}
    return {
        name: np.stack(arrays[: stacks[name]]) if name in stacks else arrays[0]
        for name, arrays in found.items()
    }


def greedy_tokens(model: Any, inputs: Inputs, count: int) -> np.ndarray:
    """`count` tokens by transformers' greedy `generate`, stop tokens not heeded.

    `model` is a Qwen2_5_VLForConditionalGeneration, which `generate`'s own annotation refuses.
    """
    import torch
    from transformers import GenerationConfig

    if count == 0:
        return np.zeros(0, np.int64)
    model.generation_config = GenerationConfig()  # a checkpoint's own penalties must not interfere
    config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    with torch.no_grad():
        tokens = model.generate(**inputs, generation_config=config)
    found: np.ndarray = tokens[0, inputs["input_ids"].shape[1] :].numpy()
    return found


class TorchReference:
    """A checkpoint as transformers sees it: tokenizer, image processor, model."""

    def __init__(self, path: str | pathlib.Path) -> None:
        """Loads everything.

        Raises:
            ValueError: torch is not installed.
        """
        with _needs_torch():
            import torch
            from transformers import (
                AutoTokenizer,
                Qwen2_5_VLForConditionalGeneration,
                Qwen2VLImageProcessorPil,
            )

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def inputs(self, images: Sequence[bytes], text: str) -> Inputs:
        """Keyword arguments of the model for one prompt, images first.

        Source: transformers Qwen2_5_VLProcessor (which needs torchvision as a whole).
        """
        import torch

        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        tokenizer: Tokenizer = self.tokenizer
        rendered = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )
        inputs: Inputs = {}
        if images:
            decoded = [
                Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB") for data in images
            ]
            processed = self.image_processor(decoded, return_tensors="np")
            inputs["pixel_values"] = torch.from_numpy(np.asarray(processed["pixel_values"]))
            grids = np.asarray(processed["image_grid_thw"])
            inputs["image_grid_thw"] = torch.from_numpy(grids)
            unit = self.image_processor.merge_size**2
            for grid in grids:
                run = "<|placeholder|>" * int(grid.prod() // unit)
                rendered = rendered.replace("<|image_pad|>", run, 1)
            rendered = rendered.replace("<|placeholder|>", "<|image_pad|>")
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        inputs["input_ids"] = torch.tensor([ids])
        is_image = inputs["input_ids"] == self.model.config.image_token_id
        inputs["mm_token_type_ids"] = is_image.int()
        return inputs

    def positions(self, inputs: Inputs) -> np.ndarray:
        """M-RoPE ids [3, T] of one prompt."""
        positions, _ = self.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        found: np.ndarray = positions[:, 0].numpy()
        return found


@contextlib.contextmanager
def _needs_torch() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"speciarl parity compares with transformers on torch, and {error.name!r} is not "
            "installed; pip install 'speciarl-jax[test]'"
        ) from error
