"""The patches of one image in the order of Hugging Face's processor."""

from __future__ import annotations

import numpy as np
from PIL import Image

from speciarl_jax.arch import VisionArch
from speciarl_jax.data.images import ImageLimits, VisionArrays, grid_of, num_windows, resize_image


def hf_order(
    image: Image.Image, arch: VisionArch, limits: ImageLimits
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """([N, patch_dim] float32, grid): what `fill_windows` wrote, put back into HF's raster."""
    pixels = resize_image(image, arch, limits)
    grid = grid_of(pixels, arch)
    arrays = VisionArrays.empty(1, num_windows(grid, arch), arch)
    layout = arrays.fill_windows(0, pixels, arch, limits)
    is_real = layout.source >= 0
    patches = np.full((grid[1] * grid[2], arch.patch_dim), np.nan, np.float32)
    patches[layout.source[is_real]] = arrays.patches[0, is_real]
    return patches, grid
