"""Backgrounds, foliage and rain: soft gradients with a few large quiet shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from speciarl_jax.data.field_guide.scene import Colour, mix


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sky colours (top, bottom), ground colours (top, bottom; None: no ground), extra shapes."""

    sky: tuple[Colour, Colour]
    ground: tuple[Colour, Colour] | None
    extra: str


_SKY = ((150, 200, 236), (216, 236, 244))
_PALE = ((206, 222, 228), (236, 238, 230))
_DUSK = ((170, 164, 208), (248, 212, 190))
_LEAFY = ((132, 176, 132), (196, 216, 168))
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "bird": (
        Setting(_SKY, ((150, 192, 110), (106, 158, 84)), "tufts"),
        Setting(_PALE, ((228, 208, 160), (204, 180, 130)), "hills"),
        Setting(_SKY, ((134, 186, 204), (100, 158, 184)), "ripples"),
        Setting(_LEAFY, None, "bokeh"),
        Setting(_DUSK, ((176, 160, 150), (140, 126, 124)), "hills"),
    ),
    "flower": (
        Setting(_LEAFY, None, "bokeh"),
        Setting(_SKY, ((150, 192, 110), (106, 158, 84)), "tufts"),
        Setting(((176, 160, 136), (140, 122, 100)), None, "bokeh"),
        Setting(_PALE, ((170, 198, 150), (130, 168, 120)), "hills"),
    ),
    "aircraft": (
        Setting(_SKY, None, "clouds"),
        Setting(_PALE, None, "clouds"),
        Setting(_DUSK, None, "clouds"),
        Setting(((120, 176, 226), (186, 218, 238)), ((160, 186, 130), (120, 156, 104)), "hills"),
    ),
    "dog": (
        Setting(_SKY, ((150, 192, 110), (106, 158, 84)), "tufts"),
        Setting(_SKY, ((232, 212, 164), (208, 184, 136)), "ripples"),
        Setting(_PALE, ((200, 210, 214), (176, 190, 200)), "hills"),
        Setting(((222, 204, 186), (234, 222, 206)), ((188, 160, 132), (164, 136, 110)), "none"),
    ),
}
GLOW = Setting(((250, 214, 150), (255, 244, 214)), ((226, 190, 150), (206, 168, 130)), "none")
MIST = Setting(((206, 212, 216), (226, 228, 228)), ((204, 210, 208), (190, 198, 198)), "none")


def paint_background(
    size: tuple[int, int], setting: Setting, rng: np.random.Generator
) -> Image.Image:
    """Returns a picture of `size` (pixels) with the setting's gradients and shapes."""
    width, height = size
    tint = rng.integers(-14, 15, 3)
    image = _ramp(size, setting.sky, tint)
    if setting.ground is not None:
        horizon = round(height * rng.uniform(0.5, 0.72))
        ground = _ramp((width, height - horizon), setting.ground, tint)
        if setting.extra == "hills":
            _draw_hills(image, horizon, mix(setting.sky[1], setting.ground[0], 0.5), rng)
        image.paste(ground, (0, horizon))
        _draw_ground(image, horizon, setting, rng)
    elif setting.extra == "clouds":
        _draw_ovals(image, (250, 252, 253), rng, count=7, flatness=0.4)
    elif setting.extra == "bokeh":
        _draw_ovals(image, mix(setting.sky[1], (255, 255, 240), 0.4), rng, count=6, flatness=1.0)
        _draw_ovals(image, mix(setting.sky[0], (60, 100, 60), 0.25), rng, count=5, flatness=1.0)
    return image


def _ramp(size: tuple[int, int], ends: tuple[Colour, Colour], tint: np.ndarray) -> Image.Image:
    """Vertical gradient between two tinted colours."""
    share = np.linspace(0.0, 1.0, 16)[:, None]
    rows = np.asarray(ends[0]) * (1 - share) + np.asarray(ends[1]) * share + tint
    column = np.clip(rows, 0, 255).astype(np.uint8)[:, None]
    return Image.fromarray(column).resize(size, Image.Resampling.BILINEAR)


def _draw_hills(image: Image.Image, horizon: int, colour: Colour, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, reach = rng.uniform(0, image.width), image.width * rng.uniform(0.3, 0.5)
        rise = image.height * rng.uniform(0.06, 0.16)
        pen.ellipse((x - reach, horizon - rise, x + reach, horizon + rise), fill=colour)


def _draw_ground(
    image: Image.Image, horizon: int, setting: Setting, rng: np.random.Generator
) -> None:
    """Grass tufts or ripples on the ground."""
    if setting.ground is None or setting.extra not in ("tufts", "ripples"):
        return
    pen = ImageDraw.Draw(image)
    light = mix(setting.ground[0], (255, 255, 255), 0.25)
    dark = mix(setting.ground[1], (20, 60, 40), 0.2)
    spots = rng.uniform(0, 1, (16, 3))
    for across, down, reach in spots.tolist():
        x, y = across * image.width, horizon + down * (image.height - horizon)
        size = (0.02 + 0.04 * reach) * image.width
        if setting.extra == "tufts":
            pen.polygon([(x - size * 0.4, y), (x, y - size), (x + size * 0.4, y)], fill=dark)
        else:
            pen.ellipse((x - size * 2, y - size * 0.2, x + size * 2, y + size * 0.2), fill=light)


def _draw_ovals(
    image: Image.Image, colour: Colour, rng: np.random.Generator, count: int, flatness: float
) -> None:
    """Clouds or soft discs of light."""
    pen = ImageDraw.Draw(image)
    for across, down, reach in rng.uniform(0, 1, (count, 3)).tolist():
        x, y = across * image.width, down * image.height
        size = (0.08 + 0.1 * reach) * image.width
        pixel = np.asarray(image.crop((int(x), int(y), int(x) + 1, int(y) + 1)))
        red, green, blue = pixel[0, 0].tolist()
        shade = mix(colour, (red, green, blue), 0.45)
        pen.ellipse((x - size, y - size * flatness, x + size, y + size * flatness), fill=shade)


def paint_foliage(
    image: Image.Image,
    centre: tuple[float, float],
    reach: float,
    covered: list[tuple[float, float]],
    rng: np.random.Generator,
) -> None:
    """Paints leaves in place: scattered over the subject, dense over the parts to hide.

    Args:
        image: Picture to paint on.
        centre: Pixel position of the subject.
        reach: Half the subject's size, pixels.
        covered: Pixel positions of the parts that tell the genera of the family apart.
        rng: Source of randomness.
    """
    pen = ImageDraw.Draw(image)
    scattered = np.asarray(centre) + rng.uniform(-1.15, 1.15, (30, 2)) * reach
    dense = np.repeat(np.asarray(covered), 9, axis=0)
    dense = dense + rng.normal(0.0, 0.13, dense.shape) * reach
    places = np.concatenate([scattered, dense])
    for base, (turn, tone, grow) in zip(places, rng.uniform(-1, 1, (len(places), 3)), strict=True):
        length, angle = reach * (0.3 + 0.1 * grow), turn * np.pi
        along = np.array([np.cos(angle), np.sin(angle)]) * length
        side = np.array([-along[1], along[0]]) * 0.4
        leaf = [base - along, base - 0.2 * along + side, base + along, base - 0.2 * along - side]
        colour = mix((70, 128, 62), (128, 172, 84), (tone + 1) / 2)
        pen.polygon([tuple(point) for point in leaf], fill=colour)


def paint_rain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Returns the picture behind a thin grey veil and slanting streaks."""
    veiled = Image.blend(image, Image.new("RGB", image.size, (168, 178, 190)), 0.22)
    pen = ImageDraw.Draw(veiled)
    reach = min(image.size)
    slant = rng.uniform(0.15, 0.35)
    for number, (across, down, length) in enumerate(rng.uniform(0, 1, (80, 3)).tolist()):
        x, y = (across * 1.3 - 0.15) * image.width, (down * 1.2 - 0.2) * image.height
        fall = (0.1 + 0.1 * length) * reach
        line = [(x, y), (x - slant * fall, y + fall)]
        colour = (226, 234, 244) if number % 2 else (128, 144, 168)  # seen on dark and on white
        pen.line(line, fill=colour, width=max(2, round(reach * 0.008)))
    return veiled
