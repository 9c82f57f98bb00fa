"""One look for every chart: colours, axes, and SVG whose colours follow the page's theme.

Charts are drawn once. For PNG files colours are those of the light theme; for the page every
colour of `LIGHT` is replaced by a CSS variable, so that dark mode and print need no second chart.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from speciarl_jax.files import whole_file

if TYPE_CHECKING:  # not in every version of matplotlib
    from matplotlib.typing import RcKeyType

# Sequential blues for the rungs that are not wrong, so that "more" reads as "darker"; red for
# wrong, grey for abstain: told apart under the common colour-vision deficiencies.
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2430",
    "muted": "#667085",
    "grid": "#e3e7ee",
    "format_failure": "#8a63a8",
    "wrong": "#d4554f",
    "abstain": "#b4bac4",
    "generic": "#cfe3f3",
    "less_specific": "#8fc0e3",
    "specific": "#3c8dc5",
    "more_specific": "#155a8a",
    "judge_failure": "#e8d7a9",
    "line0": "#1f6fb2",
    "line1": "#d9762b",
    "line2": "#3f9a5a",
    "line3": "#8d5fb8",
    "line4": "#b8406c",
    "line5": "#6b7a1f",
}
DARK = LIGHT | {
    "paper": "#151a22",
    "ink": "#e8ecf3",
    "muted": "#9aa5b6",
    "grid": "#2b3340",
    "format_failure": "#b592d1",
    "wrong": "#e8736d",
    "abstain": "#7d8694",
    "generic": "#2f4a61",
    "less_specific": "#3f78a3",
    "specific": "#6db3e4",
    "more_specific": "#c2e4fb",
    "judge_failure": "#8a7a48",
    "line0": "#6bb1ec",
    "line1": "#f0a268",
    "line2": "#7ccb94",
    "line3": "#bd9ae0",
    "line4": "#e680a6",
    "line5": "#b9c76a",
}
_RC: dict[RcKeyType, str | float] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files; "$" must stay a dollar
    "svg.hashsalt": "speciarl",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": LIGHT["paper"],
    "savefig.facecolor": LIGHT["paper"],
    "axes.edgecolor": LIGHT["grid"],
    "grid.color": LIGHT["grid"],
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
}


def line_color(index: int) -> str:
    """Colour of the run, data set or average number `index`; they repeat after six."""
    return LIGHT[f"line{index % 6}"]


def readable(name: str) -> str:
    """``less_specific`` -> ``less specific``."""
    return name.replace("_", " ")


@contextmanager
def chart(
    rows: int = 1, columns: int = 1, width: float = 4.6, height: float = 2.9
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of rows x columns panels, each `width` x `height` inches, in the house style."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure at 150 dpi."""
    FigureCanvasAgg(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element whose colours are CSS variables.

    A screen reader says `label`, plain text.
    """
    with mpl.rc_context(_RC):
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name.replace('_', '-')})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = _unique_ids(text, label)
    # The page sets the size; of the attributes only the view box stays.
    return re.sub(
        r'<svg [^>]*(viewBox="[^"]*")[^>]*>',
        lambda m: f'<svg {m.group(1)} role="img" aria-label="{html.escape(label)}">',
        text,
        count=1,
    )


def _unique_ids(text: str, label: str) -> str:
    """Prefixes ids, which are shared by all charts of a page, with one for this chart."""
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40]
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
