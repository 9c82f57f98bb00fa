"""Specimens: which species, how hard, and the picture that follows from the seed.

A share of the pictures is hard, by degrees. Rain hides the pattern, so that two species of the
genus remain; moonlight hides the colour and which pattern it is: three remain. Silhouettes leave
the six of the genus; tiny, blurred or overgrown ones show the family only: twelve. So a guess at
the species is right with probability 1/2, 1/3, 1/6 or 1/12.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from speciarl_jax.data.field_guide import draw_aircraft, draw_birds, draw_dogs, draw_flowers
from speciarl_jax.data.field_guide.backgrounds import (
    GLOW,
    MIST,
    SETTINGS,
    Setting,
    paint_background,
    paint_foliage,
    paint_rain,
)
from speciarl_jax.data.field_guide.scene import OVERSAMPLE, PALETTE, Canvas, Colour, Look, mix
from speciarl_jax.data.field_guide.taxonomy import Species, load_species

SPLITS = ("warmup", "train", "validation", "test")
MIN_SIDE_PX, MAX_SIDE_PX = 84, 168
# How a picture that leaves so many species open can be drawn.
HARD_KINDS = {
    2: ("rain",),
    3: ("moonlight",),
    6: ("backlight", "mist"),
    12: ("distance", "foliage", "blur"),
}
# Candidates of the hard pictures, which follow each other in this order: of twenty, fifteen are
# silhouettes; the warm-up sees every kind often enough to learn it.
HARD_CYCLE = (6, 6, 12, 6, 6, 6, 6, 12, 6, 6, 2, 6, 6, 12, 6, 6, 6, 6, 6, 3)
WARMUP_CYCLE = (6, 12, 2, 6, 12, 3)
_HONEST_LEVELS = {1: "species", 2: "genus", 3: "genus", 6: "genus", 12: "family"}
PAINTERS: dict[str, Callable[[Canvas, Look], None]] = {
    "finch": draw_birds.draw_finch,
    "wren": draw_birds.draw_wren,
    "heron": draw_birds.draw_heron,
    "ibis": draw_birds.draw_ibis,
    "aster": draw_flowers.draw_aster,
    "cosmos": draw_flowers.draw_cosmos,
    "tulip": draw_flowers.draw_tulip,
    "bellflower": draw_flowers.draw_bellflower,
    "twinjet": draw_aircraft.draw_twinjet,
    "deltajet": draw_aircraft.draw_deltajet,
    "biplane": draw_aircraft.draw_biplane,
    "seaplane": draw_aircraft.draw_seaplane,
    "whippet": draw_dogs.draw_whippet,
    "beagle": draw_dogs.draw_beagle,
    "husky": draw_dogs.draw_husky,
    "corgi": draw_dogs.draw_corgi,
}

_MOONLIT: Colour = (116, 124, 140)  # every subject's colour by moonlight

# Unit positions of the parts by which a family's two genera differ: foliage hides them.
GENUS_PARTS: dict[str, tuple[tuple[float, float], ...]] = {
    "songbird": ((-0.6, -0.6), (-0.85, 0.5), (0.85, -0.25)),
    "wader": ((0.8, -0.45), (0.75, -0.8), (0.3, -0.5)),
    "daisy": ((0.5, -0.5), (-0.5, -0.5), (0.5, 0.35), (-0.5, 0.35)),
    "lily": ((0.0, -0.75), (-0.6, -0.55), (0.5, -0.5), (-0.45, 0.65), (0.5, 0.7)),
    "jet": ((0.1, -0.5), (0.1, 0.5), (-0.85, -0.35), (-0.85, 0.35), (-0.4, 0.0)),
    "propplane": ((0.2, -0.5), (0.4, 0.65), (-0.4, 0.65)),
    "hound": ((-0.75, -0.5), (-0.85, 0.3), (0.1, 0.3)),
    "spitz": ((-0.45, 0.75), (0.3, 0.75), (-0.75, -0.3)),
}


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One picture to be: it is fully determined by these fields.

    Attributes:
        species: What is shown.
        candidates: Number of species that the picture leaves open: 1, 2, 3, 6 or 12.
        seed: (seed, domain number, split number, index): unique to the specimen.
    """

    species: Species
    candidates: int
    seed: tuple[int, ...]

    @property
    def is_hard(self) -> bool:
        """Whether the species cannot be told."""
        return self.candidates > 1

    @property
    def honest_level(self) -> str:
        """Deepest level that can be told for certain: species, genus or family."""
        return _HONEST_LEVELS[self.candidates]


def draw_specimens(
    domain: str,
    split: str,
    count: int,
    seed: int = 0,
    hard_frac: float = 0.4,
    cycle: Sequence[int] = HARD_CYCLE,
) -> list[Specimen]:
    """Returns a shuffled, class-balanced list of specimens, of which exactly `hard_frac` are hard.

    No specimen's seed is shared between domains or `SPLITS`.

    Raises:
        ValueError: Unknown domain or split, negative count, or hard_frac out of range.
    """
    domains = load_species()
    if domain not in domains:
        raise ValueError(f"domain={domain!r}: expected one of {', '.join(domains)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if count < 0 or not 0.0 <= hard_frac <= 1.0:
        raise ValueError(f"count={count}, hard_frac={hard_frac}: need count >= 0, share in [0, 1]")
    key = (seed, list(domains).index(domain), SPLITS.index(split))
    rng = np.random.default_rng(key)
    members = [domains[domain][k] for k in rng.permutation(len(domains[domain]))]
    order = rng.permutation(count)
    candidates = np.ones(count, dtype=int)
    hard = rng.permutation(count)[: round(count * hard_frac)]
    candidates[hard] = np.resize(np.array(cycle), len(hard))
    return [
        Specimen(members[place % len(members)], left_open, (*key, index))
        for index, (place, left_open) in enumerate(
            zip(order.tolist(), candidates.tolist(), strict=True)
        )
    ]


def render(specimen: Specimen) -> Image.Image:
    """Returns the specimen's RGB picture; each side is 84 to 168 px. Deterministic."""
    rng = np.random.default_rng(specimen.seed)
    width, height = rng.integers(MIN_SIDE_PX, MAX_SIDE_PX + 1, 2).tolist()
    settings = SETTINGS[specimen.species.domain]
    setting = settings[rng.integers(len(settings))]
    kind = str(rng.choice(HARD_KINDS[specimen.candidates])) if specimen.is_hard else "clear"
    setting = {"backlight": GLOW, "mist": MIST}.get(kind, setting)
    image = paint_background((width * OVERSAMPLE, height * OVERSAMPLE), setting, rng)
    canvas = _place(image, specimen.species, kind, rng)
    PAINTERS[specimen.species.genus](canvas, _look(specimen.species, kind, setting, rng))
    if kind == "foliage":
        covered = canvas.to_pixels(np.asarray(GENUS_PARTS[specimen.species.family]))
        paint_foliage(image, canvas.centre, canvas.scale, covered, rng)
    elif kind == "rain":
        image = paint_rain(image, rng)
    elif kind == "moonlight":
        image = ImageOps.colorize(image.convert("L"), (8, 10, 30), (196, 206, 240))
    image = image.reduce(OVERSAMPLE)
    blur_px = {
        "distance": rng.uniform(1.1, 1.5),
        "blur": canvas.scale / OVERSAMPLE * rng.uniform(0.24, 0.3),
        "mist": 0.7,
    }.get(kind)
    if blur_px is not None:
        image = image.filter(ImageFilter.GaussianBlur(blur_px))
    return _relight(image, rng)


def encode_png(specimen: Specimen) -> bytes:
    """Returns the specimen's picture as PNG bytes."""
    buffer = io.BytesIO()
    render(specimen).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _place(image: Image.Image, species: Species, kind: str, rng: np.random.Generator) -> Canvas:
    """Chooses the subject's size, position, turn and direction."""
    side = min(image.size)
    scale = side * rng.uniform(0.37, 0.46)
    if kind == "distance":
        scale = OVERSAMPLE * rng.uniform(6.0, 8.0)
    slack = np.maximum(np.asarray(image.size) / 2 - scale * 1.08, 0.0)
    shift = rng.uniform(-1.0, 1.0, 2) * slack
    tilt = 28.0 if species.family == "jet" else 9.0
    return Canvas(
        image=image,
        centre=(image.width / 2 + shift[0], image.height / 2 + shift[1]),
        scale=scale,
        degrees=rng.uniform(-tilt, tilt),
        is_flipped=bool(rng.integers(2)),
    )


def _look(species: Species, kind: str, setting: Setting, rng: np.random.Generator) -> Look:
    """Colours with a little jitter; what a hard picture hides is not in it."""
    hue = _MOONLIT if kind == "moonlight" else PALETTE[species.parts[0][1]]
    colour = np.asarray(hue) + rng.integers(-10, 11, 3)
    red, green, blue = np.clip(colour, 0, 255).tolist()
    silhouette: Colour | None = None
    if kind == "backlight":
        silhouette = mix((58, 46, 56), (104, 84, 84), rng.uniform())
    elif kind == "mist":
        silhouette = mix((150, 158, 164), (120, 128, 138), rng.uniform())
    elif kind in HARD_KINDS[12]:
        silhouette = mix(mix(setting.sky[1], (52, 60, 66), 0.9), (88, 94, 94), rng.uniform())
    pattern = species.parts[1][1]
    if kind == "moonlight" and pattern != "plain":
        pattern = "spotted"  # pale patches, whatever they are by day
    elif kind not in ("clear", "moonlight"):
        pattern = "plain"
    return Look((red, green, blue), pattern, float(rng.uniform(-0.05, 0.05)), silhouette)


def _relight(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scales brightness and warmth by a table per channel."""
    gain = rng.uniform(0.84, 1.08) * (1.0 + rng.uniform(-0.04, 0.04, 3))
    table = np.clip(np.arange(256)[None] * gain[:, None], 0, 255).astype(np.uint8)
    return image.point(table.ravel().tolist())
