"""`speciarl parity`: our policy against transformers, prompt by prompt, component by component.

Both sides start from the same image files and the same question, so that resizing, patch and
window order, chat template and M-RoPE ids are compared along with the model.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from speciarl_jax.convert.loading import load_policy, resolve_checkpoint
from speciarl_jax.convert.parity.activations import (
    DECODER_LAYERS,
    LOGITS,
    MERGER,
    PATCH_EMBED,
    VISION_BLOCKS,
    next_logits,
    policy_activations,
)
from speciarl_jax.convert.parity.table import (
    CaseReport,
    ParityReport,
    kl_per_token,
    max_abs_error,
    max_rel_error,
    top1_agreement,
)
from speciarl_jax.convert.parity.torch_reference import (
    IMAGE_EMBEDS,
    TorchReference,
    capture_activations,
    greedy_tokens,
)
from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.data.collate import collate
from speciarl_jax.data.images import ImageLimits, grid_of, num_windows, window_layout
from speciarl_jax.data.prompts import EncodedPrompt, PromptBuilder, PromptTemplate
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import Policy, encode_images

LONG_PROMPT_TOKENS = 400
_LENGTH_STEP = 256  # prompts are padded to multiples of this, so that few shapes compile
_QUESTION = "What is shown here? Think first, then answer."
_SIZES_PX = ((84, 84), (150, 210), (56, 560))  # (height, width): none a whole number of windows
_PICTURE_SEED = 20


@dataclasses.dataclass(frozen=True)
class ParityCase:
    """One prompt: encoded images and a question."""

    name: str
    images: tuple[bytes, ...]
    text: str


def run_parity(
    path: str | pathlib.Path,
    *,
    candidate: str | pathlib.Path | None = None,
    image_files: Sequence[pathlib.Path] = (),
    tolerance: float = 1e-4,
    num_greedy: int = 64,
) -> ParityReport:
    """Compares our port with transformers in float32, highest matmul precision.

    Args:
        path: Hugging Face directory or hub id, which transformers loads.
        candidate: what our port loads; None for the same.
        image_files: each adds a prompt to the built-in ones.
        tolerance: bound on relative errors and on KL per token.
        num_greedy: tokens to generate on both sides, per prompt.

    Raises:
        ValueError: torch is missing, or a checkpoint or image cannot be read.
    """
    directory = resolve_checkpoint(path)
    ours_dir = directory if candidate is None else resolve_checkpoint(candidate)
    reference = TorchReference(directory)
    with jax.default_matmul_precision("highest"):
        policy = load_policy(ours_dir, Dtypes(jnp.float32, jnp.float32))
        builder = PromptBuilder(
            reference.tokenizer,
            policy.arch,
            ImageLimits.from_dir(ours_dir, policy.arch.vision),
            PromptTemplate("parity", (_QUESTION,)),
        )
        cases = parity_cases(builder, image_files)
        prompts = [builder.encode_images(case.images, case.text, case.name) for case in cases]
        reports = []
        for case, encoded in zip(cases, prompts, strict=True):
            batch = _padded_alike(encoded, prompts, policy, builder.limits, num_greedy)
            reports.append(_compare(reference, policy, case, encoded, batch, num_greedy))
    return ParityReport(str(path), tolerance, tuple(reports))


def parity_cases(
    builder: PromptBuilder, image_files: Sequence[pathlib.Path] = ()
) -> list[ParityCase]:
    """Text only, one image of each of three shapes, two images, and one long prompt.

    Raises:
        ValueError: a file of `image_files` cannot be read.
    """
    pictures = [_picture(height, width) for height, width in _SIZES_PX]
    cases = [ParityCase("text only", (), _QUESTION)]
    for (height, width), picture in zip(_SIZES_PX, pictures, strict=True):
        cases.append(ParityCase(f"image {height}x{width}", (picture,), _QUESTION))
    cases.append(ParityCase("two images", (pictures[1], pictures[2]), _QUESTION))
    long_text = _QUESTION
    while len(builder.tokens_for(long_text, [])) < LONG_PROMPT_TOKENS:
        long_text += " " + _QUESTION
    cases.append(ParityCase("long prompt", (pictures[0],), long_text))
    for file in image_files:
        if not file.is_file():
            raise ValueError(f"--image={file}: no such file")
        cases.append(ParityCase(file.name, (file.read_bytes(),), _QUESTION))
    return cases


def _picture(height: int, width: int) -> bytes:
    """A PNG of coloured blobs with noise: neither flat nor white noise, nowhere symmetric."""
    rng = np.random.default_rng((_PICTURE_SEED, height, width))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-40, 41, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _padded_alike(
    encoded: EncodedPrompt,
    prompts: Sequence[EncodedPrompt],
    policy: Policy,
    limits: ImageLimits,
    num_greedy: int,
) -> PromptBatch:
    """A batch of one prompt, in shapes that the others share, with room to generate."""
    vision = policy.arch.vision
    windows = [num_windows(grid_of(pixels, vision), vision) for p in prompts for pixels in p.pixels]
    room = len(encoded.tokens) + num_greedy
    return collate(
        [encoded],
        policy.arch,
        limits,
        pad_id=0,
        prompt_buckets=(math.ceil(room / _LENGTH_STEP) * _LENGTH_STEP,),
        window_buckets=(max(windows),),
        images_per_prompt=max(len(prompt.pixels) for prompt in prompts),
    )


def _compare(
    reference: TorchReference,
    policy: Policy,
    case: ParityCase,
    encoded: EncodedPrompt,
    batch: PromptBatch,
    num_greedy: int,
) -> CaseReport:
    inputs = reference.inputs(case.images, case.text)
    tokens = inputs["input_ids"][0].numpy()
    theirs = capture_activations(reference.model, inputs)
    ours = our_activations(policy, batch, encoded)
    pixels_max_abs = 0.0
    if case.images:
        pixels = _in_window_order(inputs["pixel_values"].numpy(), encoded, policy)
        pixels_max_abs = max_abs_error(batch.vision.patches[batch.vision.mask], pixels)
        theirs[PATCH_EMBED] = _in_window_order(theirs[PATCH_EMBED], encoded, policy)
    report = CaseReport(
        name=case.name,
        num_tokens=len(tokens),
        num_images=len(case.images),
        has_equal_tokens=np.array_equal(tokens, encoded.tokens),
        has_equal_positions=np.array_equal(reference.positions(inputs), encoded.positions),
        pixels_max_abs=pixels_max_abs,
    )
    if not report.has_equal_tokens:
        return report  # nothing below would compare like with like
    pairs = split_components(ours, theirs, policy)
    kl = kl_per_token(ours[LOGITS][0], theirs[LOGITS][0])
    our_greedy = greedy(policy, batch, num_greedy)
    is_equal = our_greedy == greedy_tokens(reference.model, inputs, num_greedy)
    return dataclasses.replace(
        report,
        max_abs={name: max_abs_error(a, b) for name, (a, b) in pairs.items()},
        max_rel={name: max_rel_error(a, b) for name, (a, b) in pairs.items()},
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1=top1_agreement(ours[LOGITS][0], theirs[LOGITS][0]),
        greedy_equal=int(np.cumprod(is_equal).sum()),
        greedy_total=num_greedy,
    )


def _in_window_order(rows: np.ndarray, encoded: EncodedPrompt, policy: Policy) -> np.ndarray:
    """Rows of patches in raster order, all images joined, brought into window order."""
    ordered, start = [], 0
    for pixels in encoded.pixels:
        source = window_layout(grid_of(pixels, policy.arch.vision), policy.arch.vision).source
        source = source[source >= 0]
        ordered.append(rows[start + source])
        start += len(source)
    return np.concatenate(ordered)


def batch_arrays(batch: PromptBatch, merge_unit: int) -> dict[str, np.ndarray]:
    """What `policy_activations` takes, from a collated batch."""
    return {
        "tokens": batch.tokens,
        "positions": batch.positions,
        "lengths": batch.prompt_lengths,
        "image_rows": batch.table_rows(batch.vision.mask.size // merge_unit),
        "patches": batch.vision.patches,
        "patch_positions": batch.vision.positions,
        "patch_mask": batch.vision.mask,
    }


def our_activations(
    policy: Policy, batch: PromptBatch, encoded: EncodedPrompt
) -> dict[str, np.ndarray]:
    """Our activations of one prompt with all padding removed, as transformers lays them out."""
    graphdef, state = nnx.split(policy)
    arrays = batch_arrays(batch, policy.arch.vision.merge_unit)
    found = jax.device_get(policy_activations(graphdef, state, arrays))
    length = len(encoded.tokens)
    mask = batch.vision.mask
    merged_mask = mask[:, :: policy.arch.vision.merge_unit]
    texts = {k: array[..., :length, :] for k, array in found.items() if k.startswith("text/")}
    if not encoded.pixels:
        return texts
    rows = batch.image_rows[0]
    table = found[MERGER].reshape(-1, found[MERGER].shape[-1])
    return texts | {
        PATCH_EMBED: found[PATCH_EMBED][mask],
        VISION_BLOCKS: found[VISION_BLOCKS][:, mask],
        MERGER: found[MERGER][merged_mask],
        IMAGE_EMBEDS: table[rows[rows >= 0]],
    }


def split_components(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], policy: Policy
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs to compare; vision blocks are parted into windowed and full ones."""
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    full = policy.arch.vision.full_attention_blocks
    for name, array in theirs.items():
        if name not in (VISION_BLOCKS, DECODER_LAYERS):
            pairs[name] = (ours[name], array)
            continue
        for layer, (a, b) in enumerate(zip(ours[name], array, strict=True)):
            kind = " (full)" if layer in full else " (window)"
            kind = kind if name == VISION_BLOCKS else ""
            pairs[f"{name}_{layer}{kind}"] = (a, b)
    return pairs


def greedy(policy: Policy, batch: PromptBatch, count: int) -> np.ndarray:
    """`count` most likely tokens after one prompt, stop tokens not heeded; one compilation.

    Each comes from a full forward pass.

    Raises:
        ValueError: the batch is not padded far enough.
    """
    graphdef, state = nnx.split(policy)
    length = int(batch.prompt_lengths[0])
    tokens, positions = batch.tokens.copy(), batch.positions.copy()
    if length + count > tokens.shape[1]:
        raise ValueError(f"batch of {tokens.shape[1]} tokens has no room for {length} + {count}")
    positions[0, :, length:] = np.arange(length, tokens.shape[1]) + batch.position_deltas[0]
    arrays = batch_arrays(batch, policy.arch.vision.merge_unit)
    vision = [arrays.pop(name) for name in ("patches", "patch_positions", "patch_mask")]
    arrays["image_embeds"] = encode_images(graphdef, (state,), *vision)
    for place in range(length, length + count):
        arrays |= {"tokens": tokens, "positions": positions}
        arrays["lengths"] = np.array([place], np.int32)
        tokens[0, place] = int(jnp.argmax(next_logits(graphdef, state, arrays)[0]))
    return tokens[0, length : length + count]
