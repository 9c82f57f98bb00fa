"""The house as its imports draw it: rooms, floors, arrows, circles.

    python -m tests.support.house                              the figures
    python -m tests.support.house --out=docs/images/house.svg  and the picture

A room is a folder of the package or a file at its root; a floor stands above all that it imports.
The picture leaves out arrows that a longer way says already.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
from collections.abc import Iterator

PACKAGE = pathlib.Path(__file__).parents[2] / "speciarl_jax"
Graph = dict[str, set[str]]


def modules() -> dict[str, pathlib.Path]:
    """Dotted names of the package's files, its own ``__init__`` left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: pathlib.Path) -> Iterator[str]:
    """Modules and names that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_graph() -> Graph:
    """Which file of the package imports which."""
    files = modules()
    graph: Graph = {name: set() for name in files}
    for name, path in files.items():
        for full in imports(path):
            if not full.startswith("speciarl_jax."):
                continue
            target = full.removeprefix("speciarl_jax.")
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    return graph


def room(name: str) -> str:
    """The room of a file."""
    return name.partition(".")[0]


def room_graph(files: Graph) -> Graph:
    """Which room imports which."""
    graph: Graph = {room(name): set() for name in files}
    for name, targets in files.items():
        graph[room(name)] |= {room(target) for target in targets} - {room(name)}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other in a loop."""
    reach = {name: _reachable(graph, name) for name in graph}
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(list(group) for group in found)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(graph[name])
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """Floor of each room, 1 on the ground.

    Raises:
        RecursionError: rooms import each other in a circle.
    """
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            known[name] = 1 + max((floor(below) for below in graph[name]), default=0)
        return known[name]

    for name in graph:
        floor(name)
    return known


def num_lines(name: str) -> int:
    """Lines of Python in a room."""
    place = PACKAGE / name
    paths = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def draw(graph: Graph, level: dict[str, int], out: pathlib.Path) -> None:
    """The picture: floors as rows, rooms as boxes as wide as their number of lines allows."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    lines = {name: num_lines(name) for name in graph}
    figure, axes = plt.subplots(figsize=(12, 8.5))
    centre: dict[str, tuple[float, float]] = {}
    for floor in range(1, max(level.values()) + 1):
        names = sorted((n for n in graph if level[n] == floor), key=lambda n: -lines[n])
        names = names[1::2][::-1] + names[::2]  # the largest in the middle
        widths = [1.2 + (lines[name] / 1000) ** 0.5 for name in names]
        x = -(sum(widths) + 0.5 * (len(names) - 1)) / 2
        for name, width in zip(names, widths, strict=True):
            box = FancyBboxPatch(
                (x, floor - 0.26), width, 0.52, "round,pad=0.02,rounding_size=0.08",
                facecolor="#eef3f8", edgecolor="#3b5b7a", zorder=2,
            )  # fmt: skip
            axes.add_patch(box)
            label = f"{name}\n{lines[name]:,} lines"
            axes.text(x + width / 2, floor, label, ha="center", va="center", fontsize=8, zorder=3)
            centre[name] = (x + width / 2, floor)
            x += width + 0.5
    for name, targets in graph.items():
        for target in sorted(targets):
            if any(target in _reachable(graph, other) for other in targets - {target}):
                continue
            (x0, y0), (x1, y1) = centre[name], centre[target]
            axes.annotate(
                "", (x1, y1 + 0.3), (x0, y0 - 0.3), zorder=1,
                arrowprops={"arrowstyle": "-|>", "color": "#8a8f98", "linewidth": 0.9},
            )  # fmt: skip
    half = max(abs(x) for x, _ in centre.values()) + 2
    axes.set(xlim=(-half, half), ylim=(0.4, max(level.values()) + 0.6))
    axes.axis("off")
    figure.savefig(
        out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else {}
    )
    plt.close(figure)


def main() -> None:
    """Prints the figures; draws the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="SVG or PNG to write")
    args = parser.parse_args()
    files = file_graph()
    graph = room_graph(files)
    level = floors(graph)
    lines = {name: num_lines(name) for name in graph}
    total, biggest = sum(lines.values()), max(lines, key=lambda name: lines[name])
    for floor in range(max(level.values()), 0, -1):
        names = sorted(name for name in graph if level[name] == floor)
        print(f"floor {floor}  " + "  ".join(f"{name} {lines[name]}" for name in names))
    print(
        f"{len(graph)} rooms, {max(level.values())} floors, "
        f"{sum(len(targets) for targets in graph.values())} arrows, "
        f"{len(circles(files))} circles between files, {total} lines of Python, "
        f"the biggest room is {biggest} with {lines[biggest] / total:.0%}"
    )
    if args.out:
        draw(graph, level, args.out)


if __name__ == "__main__":
    main()
