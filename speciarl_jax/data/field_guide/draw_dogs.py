"""Dogs, facing right: whippet and beagle (hounds), husky and corgi (spitzes)."""

from __future__ import annotations

from speciarl_jax.data.field_guide.scene import (
    PALETTE,
    Canvas,
    Look,
    Shape,
    blob,
    mix,
    oval,
    poly,
    tube,
)


def _legs(xs: tuple[float, ...], top: float, bottom: float, half: float) -> list[Shape]:
    """Straight legs with a small paw forward."""
    return [
        poly(
            (x - half, top),
            (x - half * 0.8, bottom),
            (x + half * 1.9, bottom),
            (x + half * 0.9, bottom - half),
            (x + half, top),
        )
        for x in xs
    ]


def _face(canvas: Canvas, look: Look, eye: tuple[float, float], nose: tuple[float, float]) -> None:
    canvas.fill(look, (250, 250, 250), oval(*eye, 0.065, 0.065))
    canvas.fill(look, (20, 18, 22), oval(*eye, 0.045, 0.045))
    canvas.fill(look, (20, 18, 22), oval(*nose, 0.08, 0.07))


def _ears(canvas: Canvas, look: Look, *ears: Shape) -> None:
    """Ears a shade darker than the body; orange with the rest of the crown."""
    shade = mix(look.body, (40, 30, 30), 0.35)
    crowned = look.pattern == "orange crown"
    canvas.fill(look, PALETTE["orange"] if crowned else shade, *ears, edge=look.edge)


def _crown(canvas: Canvas, look: Look, cap: Shape) -> None:
    if look.pattern == "orange crown":
        canvas.fill(look, PALETTE["orange"], cap, edge=(150, 66, 10))


def draw_whippet(canvas: Canvas, look: Look) -> None:
    """Slender, deep chest and tucked belly, long thin legs, hanging ears, tail low."""
    trunk = blob(
        (-0.68, -0.2), (-0.2, -0.34), (0.36, -0.3), (0.46, 0.05), (0.26, 0.3), (-0.2, 0.02),
        (-0.6, 0.14),
    )  # fmt: skip
    canvas.coat(
        look,
        *_legs((-0.58, -0.42, 0.2, 0.36), -0.02, 0.95, 0.075),
        tube(((-0.64, -0.1), (-0.88, 0.2), (-0.92, 0.62)), (0.08, 0.06, 0.03)),
        tube(((0.3, -0.1), (0.48, -0.4), (0.56, -0.66)), (0.2, 0.14, 0.13)),
        oval(0.6, -0.68, 0.22, 0.18, 10.0),
        tube(((0.6, -0.68), (0.8, -0.62), (1.0, -0.56)), (0.16, 0.11, 0.06)),
        trunk,
        half=((0.0, 0.0), 90.0),
    )
    _crown(canvas, look, blob((0.8, -0.74), (0.66, -0.9), (0.46, -0.88), (0.42, -0.66)))
    _ears(canvas, look, blob((0.46, -0.82), (0.56, -0.72), (0.42, -0.4), (0.3, -0.5)))
    _face(canvas, look, (0.68, -0.7), (1.0, -0.56))


def draw_beagle(canvas: Canvas, look: Look) -> None:
    """Sturdy, level back, big hanging ears, tail straight up."""
    canvas.coat(
        look,
        *_legs((-0.56, -0.34, 0.14, 0.36), 0.1, 0.92, 0.11),
        tube(((-0.6, 0.0), (-0.74, -0.4), (-0.66, -0.86)), (0.11, 0.08, 0.05)),
        oval(-0.1, 0.1, 0.6, 0.33),
        tube(((0.26, 0.05), (0.46, -0.3)), (0.26, 0.22)),
        oval(0.52, -0.42, 0.3, 0.27),
        oval(0.8, -0.32, 0.22, 0.15, 8.0),
        half=((0.0, 0.12), 90.0),
    )
    _crown(canvas, look, blob((0.84, -0.46), (0.66, -0.74), (0.34, -0.72), (0.24, -0.42)))
    _ears(canvas, look, blob((0.3, -0.6), (0.48, -0.52), (0.44, 0.02), (0.2, 0.02), (0.18, -0.3)))
    _face(canvas, look, (0.64, -0.46), (0.98, -0.36))


def _spitz_ears(x: float, y: float) -> tuple[Shape, ...]:
    return (
        poly((x - 0.27, y - 0.08), (x - 0.3, y - 0.55), (x - 0.02, y - 0.22)),
        poly((x + 0.02, y - 0.2), (x + 0.14, y - 0.56), (x + 0.27, y - 0.08)),
    )


def _spitz_head(x: float, y: float) -> tuple[Shape, ...]:
    """Wedge head with two pointed ears."""
    muzzle = poly((x + 0.05, y - 0.12), (x + 0.46, y + 0.02), (x + 0.46, y + 0.14), (x, y + 0.24))
    return oval(x, y, 0.3, 0.27), muzzle, *_spitz_ears(x, y)


def _spitz_crown(canvas: Canvas, look: Look, x: float, y: float) -> None:
    cap = blob(
        (x + 0.27, y - 0.08), (x + 0.1, y - 0.27), (x - 0.18, y - 0.24), (x - 0.29, y - 0.02)
    )
    _crown(canvas, look, cap)
    for ear in _spitz_ears(x, y):
        _crown(canvas, look, ear)


def draw_husky(canvas: Canvas, look: Look) -> None:
    """Long legs, pointed ears, bushy tail curled over the back."""
    canvas.coat(
        look,
        *_legs((-0.54, -0.34, 0.12, 0.32), 0.1, 0.95, 0.105),
        tube(
            ((-0.58, -0.02), (-0.9, -0.32), (-0.7, -0.68), (-0.4, -0.52)), (0.12, 0.16, 0.17, 0.08)
        ),
        oval(-0.12, 0.06, 0.56, 0.32),
        tube(((0.2, 0.05), (0.42, -0.34)), (0.3, 0.24)),
        *_spitz_head(0.48, -0.4),
        half=((0.0, 0.08), 90.0),
    )
    _spitz_crown(canvas, look, 0.48, -0.4)
    _face(canvas, look, (0.58, -0.42), (0.94, -0.32))


def draw_corgi(canvas: Canvas, look: Look) -> None:
    """Very short legs, long low body, pointed ears, stub tail."""
    canvas.coat(
        look,
        *_legs((-0.66, -0.46, 0.14, 0.36), 0.4, 0.78, 0.12),
        oval(-0.84, 0.1, 0.15, 0.15),
        oval(-0.18, 0.26, 0.72, 0.34),
        tube(((0.24, 0.2), (0.46, -0.14)), (0.3, 0.24)),
        *_spitz_head(0.5, -0.18),
        half=((0.0, 0.3), 90.0),
    )
    _spitz_crown(canvas, look, 0.5, -0.18)
    _face(canvas, look, (0.6, -0.2), (0.96, -0.1))
