"""Flowers: aster and cosmos (daisies, seen from above), tulip and bellflower (lilies)."""

from __future__ import annotations

import functools
import math

import numpy as np

from speciarl_jax.data.field_guide.scene import (
    PALETTE,
    Canvas,
    Colour,
    Look,
    Shape,
    blob,
    oval,
    tube,
)

_STEM: Colour = (66, 140, 66)
_LEAF_EDGE: Colour = (34, 84, 44)
_DISC: Colour = (96, 62, 30)


def _leafy_stem(canvas: Canvas, look: Look) -> None:
    canvas.stroke(look, _STEM, 0.11, (0.0, 0.1), (0.06, 0.7), (0.02, 1.25))
    leaf = blob((0.05, 1.1), (0.3, 0.85), (0.75, 0.78), (0.5, 1.05))
    canvas.fill(look, _STEM, leaf, edge=_LEAF_EDGE)


@functools.cache
def _petal_ring(count: int, reach: float, width: float) -> tuple[Shape, ...]:
    """Petals around (0, -0.08)."""
    petals = []
    for step in range(count):
        angle = 2.0 * math.pi * (step + 0.5) / count
        x, y = math.cos(angle) * reach * 0.55, math.sin(angle) * reach * 0.55 - 0.08
        petals.append(oval(x, y, reach * 0.45, width, math.degrees(angle)))
    return tuple(petals)


@functools.cache
def _ring_spots(count: int, *radii: float) -> Shape:
    """Spot centres on the petals' axes."""
    angle = 2.0 * np.pi * (np.arange(count) + 0.5) / count
    rings = [np.stack([np.cos(angle) * r, np.sin(angle) * r - 0.08], axis=1) for r in radii]
    return np.concatenate(rings)


def _daisy(canvas: Canvas, look: Look, count: int, width: float, disc: float) -> None:
    _leafy_stem(canvas, look)
    canvas.coat(
        look,
        *_petal_ring(count, 0.92, width),
        rings=(0.0, -0.08),
        spots=_ring_spots(count, 0.46, 0.72),
        spot_radius=min(width * 0.68, 0.105),
        inner_edges=True,
    )
    centre = oval(0.0, -0.08, disc, disc)
    canvas.fill(look, _DISC, centre, edge=(56, 34, 16))
    canvas.fill(look, (140, 96, 44), oval(-0.02, -0.11, disc * 0.6, disc * 0.6))


def draw_aster(canvas: Canvas, look: Look) -> None:
    """Open face of fourteen narrow rays."""
    _daisy(canvas, look, 14, 0.105, 0.25)


def draw_cosmos(canvas: Canvas, look: Look) -> None:
    """Open face of six broad rays."""
    _daisy(canvas, look, 6, 0.37, 0.2)


def draw_tulip(canvas: Canvas, look: Look) -> None:
    """Upright closed cup with three tips on a straight stem."""
    canvas.stroke(look, _STEM, 0.12, (0.0, 0.2), (0.0, 1.2))
    left = tube(((-0.02, 1.1), (-0.42, 0.75), (-0.6, 0.2)), (0.08, 0.13, 0.02))
    right = tube(((0.02, 1.1), (0.42, 0.8), (0.66, 0.35)), (0.08, 0.13, 0.02))
    canvas.fill(look, _STEM, left, right, edge=_LEAF_EDGE)
    sides = (
        blob((-0.3, 0.28), (-0.62, -0.2), (-0.58, -0.9), (-0.2, -0.5), (0.0, 0.3)),
        blob((0.3, 0.28), (0.62, -0.2), (0.58, -0.9), (0.2, -0.5), (0.0, 0.3)),
    )
    front = blob((0.0, 0.36), (-0.34, 0.2), (-0.4, -0.35), (0.0, -0.92), (0.4, -0.35), (0.34, 0.2))
    canvas.coat(look, *sides, front, degrees=90.0, half=((0.0, -0.28), -90.0), inner_edges=True)
    if look.pattern == "orange crown":
        rim = blob((-0.3, -0.45), (0.0, -0.92), (0.3, -0.45), (0.0, -0.4))
        canvas.fill(look, PALETTE["orange"], rim)


def draw_bellflower(canvas: Canvas, look: Look) -> None:
    """Closed bell hanging from an arched stem."""
    arch = tube(
        ((-0.8, 1.25), (-0.78, 0.2), (-0.6, -0.7), (-0.1, -0.95), (0.2, -0.62)),
        (0.07, 0.06, 0.055, 0.05, 0.05),
    )
    leaf = blob((-0.8, 0.75), (-0.6, 0.45), (-0.35, 0.55), (-0.45, 0.8))
    canvas.fill(look, _STEM, arch, leaf, edge=_LEAF_EDGE)
    bell = blob(
        (0.2, -0.66),
        (-0.2, -0.45),
        (-0.3, 0.1),
        (-0.6, 0.62),
        (-0.25, 0.58),
        (-0.04, 0.82),
        (0.2, 0.6),
        (0.44, 0.82),
        (0.65, 0.58),
        (1.0, 0.62),
        (0.7, 0.1),
        (0.6, -0.45),
    )
    canvas.coat(look, bell, degrees=90.0, half=((0.2, 0.16), 90.0))
    cap = blob((0.2, -0.78), (0.0, -0.62), (0.05, -0.52), (0.2, -0.56), (0.35, -0.52), (0.4, -0.62))
    canvas.fill(look, _STEM, cap, edge=_LEAF_EDGE)
