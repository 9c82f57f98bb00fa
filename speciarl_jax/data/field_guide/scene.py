"""Drawing kit of the field guide: unit shapes, colours, and a supersampled canvas.

Subjects are drawn in unit coordinates (x right, y down, everything within [-1, 1]); the canvas
maps them by flip, rotation, scale and shift to pixels at `OVERSAMPLE` times the final size.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

OVERSAMPLE = 2
Colour = tuple[int, int, int]
Point = tuple[float, float]
Shape = np.ndarray  # [points, 2], unit coordinates

PALETTE: dict[str, Colour] = {
    "red": (214, 38, 42),
    "yellow": (247, 200, 30),
    "blue": (40, 112, 222),
    "purple": (142, 62, 190),
    "white": (246, 245, 240),
    "black": (44, 42, 52),
    "brown": (142, 80, 38),
    "orange": (255, 122, 14),
}


@dataclasses.dataclass(frozen=True)
class Look:
    """Colours and pattern of one subject; `silhouette` fills everything with one colour.

    Attributes:
        body: Main colour.
        pattern: plain, striped, spotted, half white or orange crown.
        phase: Shift of stripes and spots, in unit lengths.
        silhouette: If given, the only colour drawn: pattern and colours are hidden.
    """

    body: Colour
    pattern: str = "plain"
    phase: float = 0.0
    silhouette: Colour | None = None

    @property
    def contrast(self) -> Colour:
        """Colour of stripes and spots: dark on light bodies, white on others."""
        return PALETTE["black"] if sum(self.body) > 460 else PALETTE["white"]

    @property
    def edge(self) -> Colour:
        """Outline colour: a dark shade of the body."""
        return mix(self.body, (24, 22, 30), 0.62)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Returns `first` moved towards `second` by `share` in [0, 1]."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@functools.cache
def oval(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Shape:
    """Returns an ellipse of 28 points around (x, y), turned clockwise by `degrees`."""
    angle = np.linspace(0.0, 2.0 * np.pi, 28, endpoint=False)
    turn = math.radians(degrees)
    across, down = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack(
        [
            x + across * math.cos(turn) - down * math.sin(turn),
            y + across * math.sin(turn) + down * math.cos(turn),
        ],
        axis=1,
    )


@functools.cache
def poly(*points: Point) -> Shape:
    """Returns a polygon with straight sides."""
    return np.asarray(points, dtype=np.float64)


@functools.cache
def blob(*points: Point) -> Shape:
    """Returns a closed smooth outline through `points` (Catmull-Rom, 5 points a side)."""
    knots = np.asarray(points, dtype=np.float64)
    before, after, beyond = (np.roll(knots, shift, axis=0) for shift in (1, -1, -2))
    pieces = [_spline(before, knots, after, beyond, step) for step in np.arange(5) / 5.0]
    return np.stack(pieces, axis=1).reshape(-1, 2)


@functools.cache
def tube(points: tuple[Point, ...], widths: tuple[float, ...]) -> Shape:
    """Returns the outline of a smooth bent tube: half-widths `widths` at `points`."""
    knots = np.asarray(points, dtype=np.float64)
    ends = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    steps = np.arange(6) / 6.0
    pieces = [_spline(ends[:-3], ends[1:-2], ends[2:-1], ends[3:], step) for step in steps]
    line = np.concatenate([np.stack(pieces, axis=1).reshape(-1, 2), knots[-1:]])
    half = np.interp(np.linspace(0, len(widths) - 1, len(line)), np.arange(len(widths)), widths)
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1) * half[:, None]
    return np.concatenate([line + side, (line - side)[::-1]])


def _spline(a: Shape, b: Shape, c: Shape, d: Shape, t: float) -> Shape:
    """One Catmull-Rom point at `t` in [0, 1) between each pair of `b` and `c`."""
    bend = (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t**3
    point: Shape = 0.5 * (2 * b + (c - a) * t + bend)
    return point


@dataclasses.dataclass
class Canvas:
    """An oversampled picture and the map from unit coordinates to its pixels.

    Attributes:
        image: RGB picture, `OVERSAMPLE` times the final size.
        centre: Pixel position of the unit origin.
        scale: Pixels per unit length.
        degrees: Clockwise turn of the subject.
        is_flipped: Mirrors the subject left to right.
    """

    image: Image.Image
    centre: Point
    scale: float
    degrees: float = 0.0
    is_flipped: bool = False

    def __post_init__(self) -> None:
        """Prepares the 2 x 2 matrix and the pen."""
        turn = math.radians(self.degrees)
        mirror = -1.0 if self.is_flipped else 1.0
        self._matrix = self.scale * np.array(
            [
                [mirror * math.cos(turn), mirror * math.sin(turn)],
                [-math.sin(turn), math.cos(turn)],
            ]
        )
        self._pen = ImageDraw.Draw(self.image)
        self.line_width = max(2, round(self.scale * 0.035))

    def to_pixels(self, shape: Shape, origin: Point = (0.0, 0.0)) -> list[Point]:
        """Maps unit points to pixel points, relative to `origin`."""
        moved = shape @ self._matrix + np.subtract(self.centre, origin)
        return [tuple(point) for point in moved.tolist()]

    def fill(self, look: Look, colour: Colour, *shapes: Shape, edge: Colour | None = None) -> None:
        """Fills shapes with one colour (the silhouette's, if any), with a thin outline."""
        for shape in shapes:
            points = self.to_pixels(shape)
            self._pen.polygon(points, fill=look.silhouette or colour)
            if edge is not None and look.silhouette is None:
                self._pen.line([*points, points[0], points[1]], fill=edge, width=self.line_width)

    def stroke(self, look: Look, colour: Colour, width: float, *points: Point) -> None:
        """Draws a line of `width` unit lengths through `points`."""
        pixels = max(2, round(width * self.scale))
        path = self.to_pixels(np.asarray(points))
        self._pen.line(path, fill=look.silhouette or colour, width=pixels, joint="curve")

    def coat(
        self,
        look: Look,
        *shapes: Shape,
        degrees: float = 0.0,
        half: tuple[Point, float] = ((0.0, 0.18), 90.0),
        rings: Point | None = None,
        spots: Shape | None = None,
        spot_radius: float = 0.105,
        inner_edges: bool = False,
    ) -> None:
        """Fills the union of shapes with the look's colour and pattern, outlined and shaded.

        Args:
            look: Colours and pattern.
            *shapes: Unit shapes; only the outer outline of their union is drawn.
            degrees: Direction along which stripes follow each other.
            half: Point and direction of the half-plane that is white when `half white`.
            rings: If given, patterns run in rings around this point instead.
            spots: Centres of spots, unit coordinates; a regular grid if None.
            spot_radius: Size of spots, unit lengths.
            inner_edges: Also draws each shape's own outline (petals).
        """
        if look.silhouette is not None:
            self.fill(look, look.silhouette, *shapes)
            return
        outlines = [self.to_pixels(shape) for shape in shapes]
        for points in outlines:
            self._pen.line([*points, *points[:2]], fill=look.edge, width=2 * self.line_width)
        stacked = np.concatenate([np.asarray(points) for points in outlines])
        left, top = np.floor(stacked.min(axis=0)).astype(int).tolist()
        right, bottom = np.ceil(stacked.max(axis=0)).astype(int).tolist()
        size = (right - left + 1, bottom - top + 1)
        mask = Image.new("L", size)
        mask_pen = ImageDraw.Draw(mask)
        for shape in shapes:
            mask_pen.polygon(self.to_pixels(shape, (left, top)), fill=255)
        layer = Image.new("RGB", size, look.body)
        pattern = _Pattern(self, look, ImageDraw.Draw(layer), (left, top), spot_radius)
        pattern.draw(degrees, half, rings, spots)
        self.image.paste(layer, (left, top), mask)
        shade = ImageChops.multiply(mask, _shade_ramp().resize(size, Image.Resampling.BILINEAR))
        self.image.paste(mix(look.body, (30, 20, 60), 0.75), (left, top), shade)
        if inner_edges:
            for points in outlines:
                width = max(1, self.line_width // 2)
                self._pen.line([*points, points[0]], fill=look.edge, width=width)


@functools.cache
def _shade_ramp() -> Image.Image:
    """A small top-to-bottom ramp of shadow strength."""
    rows = np.array([0, 0, 0, 10, 35, 70], dtype=np.uint8)
    return Image.fromarray(np.repeat(rows[:, None], 2, axis=1))


@dataclasses.dataclass
class _Pattern:
    """Draws one look's pattern on a layer whose corner lies at `origin` in the picture."""

    canvas: Canvas
    look: Look
    pen: ImageDraw.ImageDraw
    origin: Point
    spot_radius: float

    def draw(
        self,
        degrees: float,
        half: tuple[Point, float],
        rings: Point | None,
        spots: Shape | None,
    ) -> None:
        """Draws the pattern; plain and (without rings) crowned looks need none here."""
        pattern = self.look.pattern
        if pattern == "spotted":
            for spot in _spot_grid() + self.look.phase if spots is None else spots:
                self._disc(spot, self.spot_radius, self.look.contrast)
        elif rings is not None:
            self._rings(rings)
        elif pattern == "striped":
            for step in np.arange(-4, 5) * 0.33 + self.look.phase:
                self._band((0.0, 0.0), degrees, step, step + 0.155, self.look.contrast)
        elif pattern == "half white":
            self._band(*half, 0.0, 3.0, PALETTE["white"])

    def _rings(self, centre: Point) -> None:
        """Striped: two rings; half white: outer half; crowned: inner half."""
        body, look = self.look.body, self.look
        steps: list[tuple[float, Colour]] = []
        if look.pattern == "striped":
            steps = [(0.88, look.contrast), (0.72, body), (0.55, look.contrast), (0.40, body)]
        elif look.pattern == "half white":
            steps = [(1.5, PALETTE["white"]), (0.6, body)]
        elif look.pattern == "orange crown":
            steps = [(0.58, PALETTE["orange"])]
        for radius, colour in steps:
            self._disc(np.asarray(centre), radius, colour)

    def _disc(self, centre: Shape, radius: float, colour: Colour) -> None:
        ((x, y),) = self.canvas.to_pixels(centre[None], self.origin)
        reach = radius * self.canvas.scale
        self.pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

    def _band(
        self, point: Point, degrees: float, start: float, stop: float, colour: Colour
    ) -> None:
        """Fills the strip from `start` to `stop` along a direction from `point`."""
        turn = math.radians(degrees)
        along = np.array([math.cos(turn), math.sin(turn)])
        side = np.array([-along[1], along[0]]) * 3.0
        first, last = point + along * start, point + along * stop
        corners = np.stack([first - side, first + side, last + side, last - side])
        self.pen.polygon(self.canvas.to_pixels(corners, self.origin), fill=colour)


@functools.cache
def _spot_grid() -> Shape:
    """Centres of a hexagonal grid over the unit square."""
    rows = [(x * 0.36 + (y % 2) * 0.18, y * 0.30) for y in range(-4, 5) for x in range(-3, 4)]
    return np.asarray(rows)
