"""Birds, facing right: finch and wren (songbirds), heron and ibis (waders)."""

from __future__ import annotations

from speciarl_jax.data.field_guide.scene import (
    PALETTE,
    Canvas,
    Colour,
    Look,
    blob,
    mix,
    oval,
    poly,
    tube,
)

_DARK: Colour = (40, 36, 40)
_HORN: Colour = (236, 160, 60)
_LEG: Colour = (120, 84, 60)
_BARK: Colour = (104, 74, 52)


def _eye(canvas: Canvas, look: Look, x: float, y: float, radius: float) -> None:
    canvas.fill(look, (250, 250, 250), oval(x, y, radius * 1.5, radius * 1.5))
    canvas.fill(look, (20, 18, 22), oval(x, y, radius, radius))


def _wing(canvas: Canvas, look: Look, x: float, y: float, reach: float) -> None:
    """An outlined folded wing; it stays off patterned bodies, which must show the pattern."""
    wing = blob(
        (x + reach * 0.6, y - reach * 0.3),
        (x + reach * 0.5, y + reach * 0.25),
        (x - reach * 0.2, y + reach * 0.4),
        (x - reach, y + reach * 0.35),
        (x - reach * 0.3, y - reach * 0.2),
    )
    if look.pattern in ("plain", "orange crown"):
        canvas.fill(look, mix(look.body, (20, 16, 40), 0.22), wing, edge=look.edge)


def _crown(canvas: Canvas, look: Look, x: float, y: float, radius: float) -> None:
    """A large orange cap with a crest pointing back."""
    if look.pattern != "orange crown":
        return
    cap = blob(
        (x + radius * 0.95, y - radius * 0.35),
        (x + radius * 0.45, y - radius * 1.12),
        (x - radius * 0.5, y - radius * 1.25),
        (x - radius * 1.9, y - radius * 1.35),
        (x - radius * 1.05, y - radius * 0.25),
    )
    canvas.fill(look, PALETTE["orange"], cap, edge=(150, 66, 10))


def draw_finch(canvas: Canvas, look: Look) -> None:
    """Round body, thick short bill, tail held low, on a perch."""
    canvas.stroke(look, _BARK, 0.1, (-1.05, 0.8), (0.2, 0.74), (1.05, 0.82))
    for x in (-0.08, 0.14):
        canvas.stroke(look, _LEG, 0.07, (x, 0.45), (x + 0.03, 0.76))
    canvas.fill(look, _HORN, poly((0.6, -0.5), (1.0, -0.24), (0.6, -0.1)), edge=(130, 76, 20))
    canvas.coat(
        look,
        oval(-0.02, 0.1, 0.56, 0.46, -24.0),
        oval(0.4, -0.32, 0.35, 0.34),
        poly((-0.3, 0.08), (-1.0, 0.42), (-0.95, 0.68), (-0.6, 0.62), (-0.25, 0.45)),
        degrees=-30.0,
        half=((0.05, 0.08), 70.0),
    )
    _wing(canvas, look, -0.15, 0.1, 0.42)
    _crown(canvas, look, 0.4, -0.34, 0.35)
    _eye(canvas, look, 0.5, -0.34, 0.06)


def draw_wren(canvas: Canvas, look: Look) -> None:
    """Round body, thin bill, tail cocked straight up, on a perch."""
    canvas.stroke(look, _BARK, 0.1, (-1.05, 0.8), (0.2, 0.84), (1.05, 0.76))
    for x in (-0.08, 0.14):
        canvas.stroke(look, _LEG, 0.07, (x, 0.5), (x + 0.03, 0.8))
    canvas.fill(look, _DARK, poly((0.62, -0.24), (1.02, -0.2), (0.64, -0.1)))
    canvas.coat(
        look,
        oval(-0.02, 0.18, 0.56, 0.44, -14.0),
        oval(0.42, -0.16, 0.31, 0.3),
        poly((-0.15, -0.1), (-0.42, -0.95), (-0.82, -0.85), (-0.55, 0.25)),
        degrees=-30.0,
        half=((0.05, 0.12), 80.0),
    )
    _wing(canvas, look, -0.12, 0.18, 0.4)
    _crown(canvas, look, 0.42, -0.18, 0.31)
    _eye(canvas, look, 0.52, -0.18, 0.055)


def _wader_legs(canvas: Canvas, look: Look, top: float, colour: Colour) -> None:
    canvas.stroke(look, colour, 0.075, (-0.2, top), (-0.14, 0.62), (-0.22, 1.0), (-0.06, 1.0))
    canvas.stroke(look, colour, 0.075, (0.0, top), (0.1, 0.62), (0.04, 1.0), (0.2, 1.0))


def draw_heron(canvas: Canvas, look: Look) -> None:
    """Long legs, S-shaped neck, straight dagger bill."""
    _wader_legs(canvas, look, 0.25, (200, 150, 60))
    canvas.fill(look, _HORN, poly((0.42, -0.94), (1.02, -0.76), (0.42, -0.7)), edge=(130, 76, 20))
    neck = ((0.1, 0.0), (0.36, -0.2), (0.14, -0.52), (0.3, -0.8))
    canvas.coat(
        look,
        oval(-0.2, 0.06, 0.52, 0.31, -18.0),
        poly((-0.5, 0.0), (-0.95, 0.38), (-0.7, 0.44), (-0.2, 0.3)),
        tube(neck, (0.2, 0.13, 0.12, 0.12)),
        oval(0.36, -0.83, 0.21, 0.16),
        degrees=-35.0,
        half=((-0.1, 0.06), 62.0),
    )
    _wing(canvas, look, -0.3, 0.04, 0.42)
    _crown(canvas, look, 0.34, -0.8, 0.24)
    _eye(canvas, look, 0.42, -0.84, 0.045)


def draw_ibis(canvas: Canvas, look: Look) -> None:
    """Long legs, short straight neck, long bill curved downwards."""
    _wader_legs(canvas, look, 0.2, (90, 70, 80))
    bill = tube(((0.5, -0.64), (0.84, -0.56), (0.98, -0.12)), (0.1, 0.075, 0.03))
    canvas.fill(look, (90, 70, 80), bill, edge=_DARK)
    canvas.coat(
        look,
        oval(-0.2, 0.0, 0.58, 0.36, -12.0),
        poly((-0.55, -0.1), (-0.98, 0.16), (-0.9, 0.34), (-0.4, 0.28)),
        tube(((0.05, -0.05), (0.28, -0.32), (0.42, -0.6)), (0.24, 0.15, 0.13)),
        oval(0.44, -0.62, 0.23, 0.21),
        degrees=-35.0,
        half=((-0.1, 0.02), 70.0),
    )
    _wing(canvas, look, -0.3, -0.02, 0.46)
    _crown(canvas, look, 0.42, -0.6, 0.26)
    _eye(canvas, look, 0.5, -0.64, 0.045)
