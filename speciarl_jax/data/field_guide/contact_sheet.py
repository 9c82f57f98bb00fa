"""A page of pictures: one of each species, and a strip of hard ones for each domain."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from speciarl_jax.data.field_guide.specimens import Specimen, draw_specimens, render
from speciarl_jax.data.field_guide.taxonomy import load_taxonomy

_CELL_PX, _CAPTION_PX, _GAP_PX = 104, 15, 6
_PAPER, _INK, _SOFT = (250, 247, 240), (54, 50, 58), (130, 122, 120)


def contact_sheet(path: str | Path, seed: int = 0, columns: int = 12) -> None:
    """Writes a PNG with one captioned picture per species and a hard row for each domain.

    Args:
        path: File to write.
        seed: Seed of the specimens shown.
        columns: Pictures a row, at least 1.
    """
    rows: list[tuple[str, list[tuple[Specimen, str]]]] = []
    for domain in load_taxonomy().domains:
        clear = _one_each(domain, seed)
        starts = range(0, len(clear), columns)
        rows += [(domain if k == 0 else "", clear[k : k + columns]) for k in starts]
        hard = draw_specimens(domain, "test", 2 * columns, seed, hard_frac=1.0)[:columns]
        hard.sort(key=lambda one: one.honest_level, reverse=True)
        captioned = [(one, f"{getattr(one.species, one.honest_level)}?") for one in hard]
        rows.append((f"{domain}: hard, with the honest answer", captioned))
    width = columns * (_CELL_PX + _GAP_PX) + 3 * _GAP_PX
    row_px = _CELL_PX + _CAPTION_PX + _GAP_PX
    height = sum(row_px + (24 if title else 0) for title, _ in rows) + 3 * _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _GAP_PX
    for title, cells in rows:
        top = _paste_row(sheet, top, title, cells)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _one_each(domain: str, seed: int) -> list[tuple[Specimen, str]]:
    """One easy specimen of each species, in the order of the taxonomy."""
    members = load_taxonomy().domains[domain]
    specimens = draw_specimens(domain, "test", len(members), seed, hard_frac=0.0)
    found = {one.species: one for one in specimens}
    return [(found[species], species.name) for species in members]


def _paste_row(sheet: Image.Image, top: int, title: str, cells: list[tuple[Specimen, str]]) -> int:
    """Pastes one row with its captions; returns where the next row starts."""
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((2 * _GAP_PX, top + 5), title, fill=_SOFT, font=ImageFont.load_default(13))
        top += 24
    for column, (specimen, caption) in enumerate(cells):
        picture = render(specimen)
        picture.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
        left = 2 * _GAP_PX + column * (_CELL_PX + _GAP_PX)
        corner = (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2)
        sheet.paste(picture, corner)
        middle = (left + _CELL_PX // 2, top + _CELL_PX + _CAPTION_PX // 2)
        pen.text(middle, caption, fill=_INK, anchor="mm", font=ImageFont.load_default(11))
    return top + _CELL_PX + _CAPTION_PX + _GAP_PX
