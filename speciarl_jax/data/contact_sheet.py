"""A page of pictures with their labels, from any source: look at the data before training on it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from speciarl_jax.data.decode import BadImageError, decode_image
from speciarl_jax.types import Example

COLUMNS = 8
CELL_PX, CAPTION_PX, GAP_PX = 148, 18, 6
_PAPER, _INK, _BAD = (250, 247, 240), (54, 50, 58), (176, 60, 52)
_CAPTION_CHARS = 24


def write_contact_sheet(examples: Sequence[Example], path: pathlib.Path) -> None:
    """Writes a PNG: a captioned thumbnail per example; unreadable images are named as such."""
    rows = max(1, math.ceil(len(examples) / COLUMNS))
    step_x, step_y = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (COLUMNS * step_x + GAP_PX, rows * step_y + GAP_PX), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for number, example in enumerate(examples):
        left = GAP_PX + number % COLUMNS * step_x
        top = GAP_PX + number // COLUMNS * step_y
        caption, colour = example.ground_truth, _INK
        try:
            picture = decode_image(example.image)
            picture.thumbnail((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
            corner = (left + (CELL_PX - picture.width) // 2, top + (CELL_PX - picture.height) // 2)
            sheet.paste(picture, corner)
        except BadImageError:
            caption, colour = f"unreadable: {example.image_name}", _BAD
        if len(caption) > _CAPTION_CHARS:
            caption = caption[: _CAPTION_CHARS - 1] + "…"
        middle = (left + CELL_PX // 2, top + CELL_PX + CAPTION_PX // 2)
        pen.text(middle, caption, fill=colour, anchor="mm", font=font)
    sheet.save(path, "PNG", optimize=True)
