"""Untrusted bytes to an upright RGB image, or a `BadImageError`."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

# No others are tried, whatever a file is called: some of Pillow's readers start programs (that of
# EPS starts Ghostscript) and few see as much hostile input as these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
MAX_SOURCE_PIXELS = 64_000_000  # refuse to decode larger images: a decompression bomb, or a mistake

# What Pillow's decoders let through on hostile bytes. `Warning` is here for runs with -W error.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


class BadImageError(ValueError):
    """Bytes that cannot become an image of usable size. Callers skip, count and list these."""


def decode_image(data: bytes, least_px: int = 0) -> Image.Image:
    """Decodes an image file of one of the `FORMATS` to RGB, upright.

    EXIF orientation is applied; transparency is laid on white (as HF's `convert_to_rgb` does);
    palette, grey, CMYK and 16-bit images are converted, the latter scaled, not clipped; of an
    animation the first frame counts.

    Args:
        data: the file.
        least_px: where a smaller picture will do, sides that are enough: some formats are decoded
            at a fraction of their size, which is faster. 0 decodes all pixels.

    Raises:
        BadImageError: no bytes, not an image, truncated, empty, over `MAX_SOURCE_PIXELS`, or
            anything else that the decoder refuses.
    Source: own; transparency from transformers image_transforms.convert_to_rgb.
    """
    if not data:
        raise BadImageError("no bytes: the file is missing, empty or may not be read")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < 1 or width * height > MAX_SOURCE_PIXELS:
                raise BadImageError(
                    f"image of {width}x{height} px: expected 1 to {MAX_SOURCE_PIXELS} pixels"
                )
            if least_px:
                image.draft("RGB", (least_px, least_px))
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright if upright is not None else image)
    except BadImageError:
        raise
    except _DECODE_ERRORS as error:
        raise BadImageError(f"cannot decode {len(data)} bytes as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _wide_grey_to_rgb(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits: Pillow's own conversion clips at 255, which gives white."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
    peak = float(values.max())
    if image.mode == "F" and peak <= 1.0:
        scale = 255.0
    elif peak <= 255.0 and not image.mode.startswith("I;"):
        scale = 1.0
    else:
        scale = 255.0 / max(peak, 65535.0)
    grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
