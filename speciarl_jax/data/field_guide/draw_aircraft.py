"""Aircraft: twinjet and deltajet (from above), biplane and seaplane (from the side)."""

from __future__ import annotations

from speciarl_jax.data.field_guide.scene import PALETTE, Canvas, Colour, Look, oval, poly, tube

_METAL: Colour = (96, 102, 112)
_METAL_EDGE: Colour = (40, 44, 52)
_GLASS: Colour = (70, 90, 110)
_ORANGE_EDGE: Colour = (150, 66, 10)


def draw_twinjet(canvas: Canvas, look: Look) -> None:
    """Swept wings, two engines, tailplane; nose to the right."""
    for side in (-1.0, 1.0):
        canvas.fill(look, _METAL, oval(0.16, side * 0.47, 0.24, 0.12), edge=_METAL_EDGE)
    wings = [
        poly((0.34, s * 0.08), (-0.32, s * 0.98), (-0.58, s * 0.98), (-0.18, s * 0.08))
        for s in (-1.0, 1.0)
    ]
    tails = [
        poly((-0.58, s * 0.05), (-0.86, s * 0.45), (-1.02, s * 0.45), (-0.9, s * 0.05))
        for s in (-1.0, 1.0)
    ]
    hull = tube(((-1.0, 0.0), (-0.6, 0.0), (0.0, 0.0), (0.6, 0.0), (0.98, 0.0)), _JET_HULL)
    canvas.coat(look, *wings, *tails, hull, half=((-0.12, 0.0), 180.0), inner_edges=True)
    if look.pattern == "orange crown":
        canvas.fill(look, PALETTE["orange"], *tails, edge=_ORANGE_EDGE)
        nose = tube(((0.45, 0.0), (0.7, 0.0), (0.98, 0.0)), (0.165, 0.14, 0.03))
        canvas.fill(look, PALETTE["orange"], nose, edge=_ORANGE_EDGE)
    canvas.fill(look, _GLASS, poly((0.68, -0.1), (0.82, -0.05), (0.82, 0.05), (0.68, 0.1)))


_JET_HULL = (0.04, 0.13, 0.17, 0.165, 0.03)


def draw_deltajet(canvas: Canvas, look: Look) -> None:
    """One big triangular wing, one exhaust, no tailplane; nose to the right."""
    canvas.fill(look, _METAL, poly((-0.75, -0.15), (-1.0, -0.2), (-1.0, 0.2), (-0.75, 0.15)))
    wings = [
        poly((0.5, s * 0.05), (-0.62, s * 0.86), (-0.82, s * 0.86), (-0.74, s * 0.05))
        for s in (-1.0, 1.0)
    ]
    hull = tube(((-0.85, 0.0), (0.0, 0.0), (0.5, 0.0), (1.02, 0.0)), (0.17, 0.17, 0.14, 0.01))
    canvas.coat(look, *wings, hull, half=((-0.25, 0.0), 180.0), inner_edges=True)
    if look.pattern == "orange crown":
        nose = tube(((0.3, 0.0), (0.6, 0.0), (1.02, 0.0)), (0.16, 0.125, 0.01))
        tips = [
            poly((-0.28, s * 0.62), (-0.62, s * 0.86), (-0.82, s * 0.86), (-0.8, s * 0.6))
            for s in (-1.0, 1.0)
        ]
        canvas.fill(look, PALETTE["orange"], nose, *tips, edge=_ORANGE_EDGE)
    canvas.fill(look, _GLASS, oval(0.36, 0.0, 0.17, 0.075), edge=_METAL_EDGE)


def _propeller(canvas: Canvas, look: Look, y: float) -> None:
    canvas.fill(look, _METAL, oval(0.9, y, 0.1, 0.13), edge=_METAL_EDGE)
    canvas.fill(look, (70, 60, 56), oval(0.96, y, 0.045, 0.5))


def _hull(canvas: Canvas, look: Look, y: float, *more: tuple[float, float, float, float]) -> None:
    """Fuselage with tail fin at height `y`; `more`: wings (x, y, half-length, half-width)."""
    body = tube(((-0.98, y - 0.1), (-0.4, y - 0.02), (0.3, y), (0.88, y)), (0.07, 0.16, 0.25, 0.19))
    fin = poly((-0.66, y - 0.05), (-0.86, y - 0.52), (-1.04, y - 0.52), (-1.02, y - 0.05))
    bars = [oval(x, at, reach, half, -4.0) for x, at, reach, half in more]
    canvas.coat(look, body, fin, half=((0.0, y + 0.02), 90.0))
    for bar in bars:
        canvas.coat(look, bar, half=((0.0, y + 0.02), 90.0))
    if look.pattern == "orange crown":
        tip = poly((-0.74, y - 0.1), (-0.86, y - 0.54), (-1.05, y - 0.54), (-1.04, y - 0.06))
        cowl = tube(((0.5, y), (0.7, y), (0.9, y)), (0.25, 0.23, 0.19))
        canvas.fill(look, PALETTE["orange"], tip, cowl, edge=_ORANGE_EDGE)


def draw_biplane(canvas: Canvas, look: Look) -> None:
    """Propeller nose, two stacked wings joined by struts, wheels; nose to the right."""
    for x in (-0.12, 0.5):
        canvas.stroke(look, _METAL_EDGE, 0.05, (x, -0.6), (x + 0.06, 0.42))
    canvas.stroke(look, _METAL_EDGE, 0.06, (0.3, 0.35), (0.42, 0.68))
    canvas.fill(look, (36, 36, 40), oval(0.42, 0.72, 0.15, 0.15))
    _propeller(canvas, look, 0.0)
    _hull(canvas, look, 0.0, (0.2, -0.62, 0.62, 0.125), (0.2, 0.4, 0.56, 0.115))
    canvas.fill(look, _GLASS, oval(-0.12, -0.24, 0.13, 0.09), edge=_METAL_EDGE)


def draw_seaplane(canvas: Canvas, look: Look) -> None:
    """Propeller nose, one high wing, two large floats; nose to the right."""
    for x in (-0.2, 0.35):
        canvas.stroke(look, _METAL_EDGE, 0.06, (x, 0.1), (x - 0.04, 0.68))
    floats = tube(((-0.72, 0.6), (-0.3, 0.72), (0.3, 0.74), (0.86, 0.6)), (0.03, 0.14, 0.16, 0.05))
    canvas.fill(look, _METAL, floats, edge=_METAL_EDGE)
    _propeller(canvas, look, -0.12)
    _hull(canvas, look, -0.12, (0.12, -0.42, 0.6, 0.125))
    canvas.fill(look, _GLASS, oval(0.34, -0.24, 0.15, 0.08), edge=_METAL_EDGE)
