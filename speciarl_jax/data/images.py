"""Untrusted image bytes to the arrays that the vision tower reads.

    bytes -> decode_image -> RGB -> resize_image -> pixels [h, w, 3] uint8
          -> window order, normalised, every window padded to full size -> VisionArrays

Numbers equal transformers' `Qwen2VLImageProcessorPil` (the torch-free processor): bicubic resize
by Pillow, rescale, normalise, raster of merge blocks. What differs is the work: pixels stay uint8
until the last moment (an eighth of the memory, so they can be kept between epochs), and patches
are written once, already in window order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import numpy as np
from PIL import Image

from speciarl_jax.arch import HfConfig, VisionArch
from speciarl_jax.data.decode import BadImageError
from speciarl_jax.files import FETCH_MODEL, read_json
from speciarl_jax.types import JsonObject

MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """How a checkpoint wants its images: its ``preprocessor_config.json``.

    Attributes:
        min_pixels, max_pixels: area after resizing, px; images outside are scaled into the range.
        mean, std: per channel (red, green, blue), of values in 0..1.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        """Refuses an empty range."""
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels}, max_pixels={self.max_pixels}: expected "
                "0 < min_pixels <= max_pixels; set data.min_pixels and data.max_pixels so"
            )

    def override(self, min_pixels: int = 0, max_pixels: int = 0) -> ImageLimits:
        """Returns a copy with the recipe's limits, px; 0 keeps the checkpoint's own."""
        return dataclasses.replace(
            self,
            min_pixels=min_pixels or self.min_pixels,
            max_pixels=max_pixels or self.max_pixels,
        )

    @classmethod
    def from_dir(cls, path: str | pathlib.Path, arch: VisionArch) -> ImageLimits:
        """Reads ``path/preprocessor_config.json``, in the `min_pixels` or the `size` style.

        Raises:
            ValueError: no such file, not JSON, a resampling or rescaling that is not implemented,
                or sizes that contradict `arch`.
        Source: transformers Qwen2VLImageProcessorPil.__init__; the class defaults fill in what the
            file leaves out, as there.
        """
        file = pathlib.Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise ValueError(f"{file}: not found; expected a Hugging Face model directory")
        config = read_json(file, FETCH_MODEL)
        _check_preprocessor(config, arch, file)
        try:
            return cls._of(config)
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            reason = "sizes, image_mean or image_std are not numbers of the usual form"
            raise ValueError(f"{file}: {reason} ({error}); {FETCH_MODEL}") from error

    @classmethod
    def _of(cls, config: HfConfig) -> ImageLimits:
        size = config.get("size") or {}
        least = config.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge")
        most = config.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge")
        default = cls()
        mean, std = config.get("image_mean", default.mean), config.get("image_std", default.std)
        if len(mean) != 3 or len(std) != 3 or not all(0 < float(x) < math.inf for x in std):
            raise ValueError(f"image_mean={mean}, image_std={std}")
        return cls(
            min_pixels=int(least or default.min_pixels),
            max_pixels=int(most or default.max_pixels),
            mean=(float(mean[0]), float(mean[1]), float(mean[2])),
            std=(float(std[0]), float(std[1]), float(std[2])),
        )


def _check_preprocessor(config: JsonObject, arch: VisionArch, file: pathlib.Path) -> None:
    expected: dict[str, int] = {
        "resample": int(Image.Resampling.BICUBIC),
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "patch_size": arch.patch_size_px,
        "merge_size": arch.spatial_merge_size,
        "temporal_patch_size": arch.temporal_patch_size,
    }
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise ValueError(f"{file}: {field}={config[field]!r}, only {value!r} is supported here")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{file}: rescale_factor={factor}, expected 1/255")


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """New (height, width), px: multiples of `factor`, area within the limits, shape roughly kept.

    Raises:
        BadImageError: an empty image, or one side more than 200 times the other.
    Source: transformers qwen2_vl smart_resize (half-to-even rounding and all).
    """
    if min(height, width) < 1:
        raise BadImageError(f"image of {width}x{height} px is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise BadImageError(
            f"image of {width}x{height} px: one side is more than {MAX_ASPECT_RATIO} times the "
            "other"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_image(image: Image.Image, arch: VisionArch, limits: ImageLimits) -> np.ndarray:
    """Resizes to whole merge blocks within the limits.

    Returns:
        [h, w, 3] uint8, h and w multiples of patch size times merge size.

    Raises:
        BadImageError: see `smart_resize`.
    """
    factor = arch.patch_size_px * arch.spatial_merge_size
    height, width = smart_resize(
        image.height, image.width, factor, limits.min_pixels, limits.max_pixels
    )
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def grid_of(pixels: np.ndarray, arch: VisionArch) -> tuple[int, int, int]:
    """(1, rows, columns) of a resized image, in patches."""
    height, width = pixels.shape[:2]
    return 1, height // arch.patch_size_px, width // arch.patch_size_px


def _pixel_patches(pixels: np.ndarray, arch: VisionArch) -> np.ndarray:
    """[h, w, C] uint8 to [N, C, patch px] uint8, HF's order: raster of merge blocks."""
    _, rows, cols = grid_of(pixels, arch)
    merge, side = arch.spatial_merge_size, arch.patch_size_px
    blocks = pixels.reshape(rows // merge, merge, side, cols // merge, merge, side, -1)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [R, C, merge, merge, channel, side, side]
    return blocks.reshape(rows * cols, arch.in_channels, side * side)


def _normalise_into(
    blocks: np.ndarray, out: np.ndarray, arch: VisionArch, limits: ImageLimits
) -> None:
    """Writes (v / 255 - mean) / std of [N, C, px] uint8 to all time slots of [N, patch_dim]."""
    values = blocks.astype(np.float32)
    values /= np.float32(255)
    values -= np.asarray(limits.mean, np.float32)[:, None]
    values /= np.asarray(limits.std, np.float32)[:, None]
    slots = out.reshape(len(blocks), arch.in_channels, arch.temporal_patch_size, -1)
    slots[:] = values[:, :, None, :]


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Where each patch of one image sits when windows are whole, dense blocks.

    The image is tiled by windows of `window_side` x `window_side` merged tokens; windows at the
    right and lower edge keep their full size, and what lies outside the image is padding. Windows
    come in raster order; merged tokens within a window too; the patches of a token are adjacent.
    Attention inside a window then is one batched matmul over equal blocks, with a mask.

    Attributes:
        source: [N_pad] int32, index into the HF-ordered patches; -1 for padding.
        positions: [N_pad, 2] int32, (row, column) of the patch in the image; 0 for padding.
        merged_rows: [M] int32, for each merged token in raster order its row in the window-ordered
            merged array [N_pad / merge_unit].
    """

    source: np.ndarray
    positions: np.ndarray
    merged_rows: np.ndarray


def num_windows(grid: tuple[int, int, int], arch: VisionArch) -> int:
    """Windows that cover a grid (1, rows, columns) of patches."""
    side = arch.window_side * arch.spatial_merge_size
    return math.ceil(grid[1] / side) * math.ceil(grid[2] / side)


@functools.lru_cache(maxsize=4096)
def window_layout(grid: tuple[int, int, int], arch: VisionArch) -> WindowLayout:
    """Window order of an image with `grid` (1, rows, columns) patches; the arrays are read-only.

    Raises:
        ValueError: a video grid, or rows and columns that are no whole merge blocks.
    Source: transformers vision_utils.get_vision_window_index and get_vision_position_ids; there
        the padding is removed, here it stays so that windows are equal blocks.
    """
    frames, rows, cols = grid
    merge, side, unit = arch.spatial_merge_size, arch.window_side, arch.merge_unit
    if frames != 1 or rows < 1 or cols < 1 or rows % merge or cols % merge:
        raise ValueError(
            f"grid {grid}: expected (1, rows, columns), both multiples of the merge size {merge}"
        )
    high, wide = rows // merge, cols // merge
    win_rows, win_cols = math.ceil(high / side), math.ceil(wide / side)
    merged = np.full((win_rows * side, win_cols * side), -1, np.int32)
    merged[:high, :wide] = np.arange(high * wide, dtype=np.int32).reshape(high, wide)
    order = merged.reshape(win_rows, side, win_cols, side).transpose(0, 2, 1, 3).reshape(-1)

    offsets = np.arange(unit, dtype=np.int32)
    source = np.where(order[:, None] >= 0, order[:, None] * unit + offsets, -1)  # [slots, unit]
    token = np.maximum(order, 0)[:, None]
    row = token // wide * merge + offsets // merge
    col = token % wide * merge + offsets % merge
    positions = np.where(source[..., None] >= 0, np.stack([row, col], axis=-1), 0)
    merged_rows = np.empty(high * wide, np.int32)
    merged_rows[order[order >= 0]] = np.flatnonzero(order >= 0)
    layout = WindowLayout(
        source=source.reshape(-1).astype(np.int32),
        positions=positions.reshape(-1, 2).astype(np.int32),
        merged_rows=merged_rows,
    )
    for array in (layout.source, layout.positions, layout.merged_rows):
        array.setflags(write=False)
    return layout


@dataclasses.dataclass(frozen=True)
class VisionArrays:
    """All images of a batch, padded to the same number of windows.

    Attributes:
        patches: [I, N_pad, patch_dim] float32, window order; 0 at padding.
        positions: [I, N_pad, 2] int32, (row, column) in patches; 0 at padding.
        mask: [I, N_pad] bool, True for real patches. Wholly False for an image slot not in use.
    """

    patches: np.ndarray
    positions: np.ndarray
    mask: np.ndarray

    @classmethod
    def empty(cls, num_images: int, num_windows: int, arch: VisionArch) -> VisionArrays:
        """All padding, to be filled by `fill_windows`."""
        length = num_windows * arch.window_patches
        return cls(
            patches=np.zeros((num_images, length, arch.patch_dim), np.float32),
            positions=np.zeros((num_images, length, 2), np.int32),
            mask=np.zeros((num_images, length), np.bool_),
        )

    def fill_windows(
        self, slot: int, pixels: np.ndarray, arch: VisionArch, limits: ImageLimits
    ) -> WindowLayout:
        """Writes one resized image, [h, w, 3] uint8, into image slot `slot`; returns its layout.

        Source: transformers Qwen2VLImageProcessorPil._preprocess and patchify; the order is ours.
        """
        layout = window_layout(grid_of(pixels, arch), arch)
        length = len(layout.source)
        is_real = layout.source >= 0
        blocks = _pixel_patches(pixels, arch)[np.maximum(layout.source, 0)]
        patches = self.patches[slot, :length]
        _normalise_into(blocks, patches, arch, limits)
        patches[~is_real] = 0
        self.positions[slot, :length] = layout.positions
        self.mask[slot, :length] = is_real
        return layout
