"""`speciarl data list | build | show | stats`: parse, call, print."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping

from speciarl_jax.cli.flags import Verbs, parse_natural
from speciarl_jax.data.sources.catalog import (
    FIELD_GUIDE_DOMAINS,
    list_sources,
    open_source,
    resolve_data_dir,
)
from speciarl_jax.data.sources.releases import BENCHMARKS
from speciarl_jax.data.sources.selection import Selection, labels_of, open_selected
from speciarl_jax.types import Example

_SPLITS = ("train", "validation", "test")
_STATS_LINE = (
    "{images} images, {classes} classes ({smallest_class} to {largest_class} images each), median "
    "{median_width_px} x {median_height_px} px, {unreadable} of {measured} unreadable"
)


def register(subparsers: Verbs) -> None:
    """Adds the verb `data` and its own verbs; each sets `handler`, a function args -> exit code."""
    data = subparsers.add_parser("data", help="list, build and look at data sources")
    verbs = data.add_subparsers(dest="data_verb", required=True)
    listing = verbs.add_parser("list", help="all sources, and whether they are built")
    listing.set_defaults(handler=run_list)
    build = verbs.add_parser("build", help="prepare a data set; again is harmless")
    build.add_argument(
        "name", help="cub, flowers, food, pets, cars, aircraft, field_guide[_DOMAIN]"
    )
    build.add_argument(
        "--archive",
        action="append",
        default=[],
        help="local archive, folder or annotation file instead of a download; repeat for several",
    )
    build.add_argument(
        "--allow_partial",
        action="store_true",
        help="take what the archives hold, official counts and checksums aside",
    )
    build.set_defaults(handler=run_build)
    show = verbs.add_parser("show", help="write a contact sheet, print a few examples")
    show.add_argument("name", help="a source of `data list`, or a mixture; field_guide for all")
    show.add_argument("--out", default="", help="PNG to write; default: NAME-SPLIT.png here")
    show.add_argument("--count", type=parse_natural, default=48, help="pictures on the sheet")
    stats = verbs.add_parser("stats", help="images, classes and sizes of each split")
    stats.add_argument("name", help="a source of `data list`, or a mixture")
    stats.add_argument(
        "--sizes", type=parse_natural, default=200, help="images whose size is measured"
    )
    for verb in (show, stats):
        verb.add_argument("--split", default="", help="one split; default: test (stats: all)")
        verb.add_argument("--seed", type=parse_natural, default=0, help="of the choice of examples")
    show.set_defaults(handler=run_show)
    stats.set_defaults(handler=run_stats)
    for verb in (listing, build, show, stats):
        verb.add_argument("--data_dir", default="", help="root of prepared data sets")
        verb.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _print(args: argparse.Namespace, content: Mapping[str, object], text: str) -> int:
    sys.stdout.write((json.dumps(content) if args.json else text) + "\n")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """`speciarl data list`."""
    infos = list_sources(args.data_dir)
    width = max(len(info.name) for info in infos)
    lines = [
        f"{info.name:<{width}}  {'ready    ' if info.is_built else 'not built'}  "
        f"{'/'.join(info.splits):<21}  {info.description}"
        for info in infos
    ]
    return _print(args, {"sources": [dataclasses.asdict(i) for i in infos]}, "\n".join(lines))


def run_build(args: argparse.Namespace) -> int:
    """`speciarl data build NAME`.

    Raises:
        ValueError: unknown name, or the builder refuses its input.
    """
    root = resolve_data_dir(args.data_dir)
    if args.name in BENCHMARKS:
        from speciarl_jax.data.sources import benchmarks

        benchmarks.build(args.name, root, args.archive, args.allow_partial)
        names = [args.name]
    elif args.name.partition(":")[0] in ("field_guide", *_expand("field_guide")):
        names = _expand(args.name)
    else:
        known = ", ".join([*BENCHMARKS, *_expand("field_guide"), "field_guide"])
        raise ValueError(f"data build {args.name!r}: expected one of {known}")
    counts = {name: _counts(name, args.data_dir) for name in names}
    text = "\n".join(
        f"{name}: ready under {root}: "
        + ", ".join(f"{split} {count}" for split, count in splits.items())
        for name, splits in counts.items()
    )
    return _print(args, {"data_dir": str(root), "counts": counts}, text)


def _expand(name: str) -> list[str]:
    """``field_guide`` stands for its four domains."""
    if name == "field_guide":
        return [f"field_guide_{domain}" for domain in FIELD_GUIDE_DOMAINS]
    return [name]


def _counts(name: str, data_dir: str) -> dict[str, int]:
    return {split: len(open_source(name, split, data_dir)) for split in _splits_of(name, data_dir)}


def _splits_of(spec: str, data_dir: str) -> list[str]:
    """Splits that a source has, found by asking; the first error counts if it has none."""
    found, first_error = [], None
    for split in _SPLITS:
        try:
            open_selected(spec, split, data_dir, Selection())
            found.append(split)
        except ValueError as error:
            first_error = first_error or error
    if not found and first_error is not None:
        raise first_error
    return found


def run_show(args: argparse.Namespace) -> int:
    """`speciarl data show NAME`: a contact sheet, and the first examples in words.

    Raises:
        ValueError: unknown source or split, or a path that cannot be written.
    """
    from speciarl_jax.data.contact_sheet import write_contact_sheet

    split = args.split or "test"
    specs = _expand(args.name)
    per_source = max(1, args.count // len(specs))
    examples = [example for spec in specs for example in _some(spec, split, args, per_source)]
    safe = re.sub(r"[^\w.-]+", "_", args.name)
    out = pathlib.Path(args.out or f"{safe}-{split}.png")
    try:
        write_contact_sheet(examples, out)
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error})") from error
    rows = [
        {"prompt_id": e.prompt_id, "ground_truth": e.ground_truth, "bytes": len(e.image)}
        for e in examples
    ]
    lines = [f"{row['prompt_id']}  {row['ground_truth']}" for row in rows[:8]]
    text = "\n".join([*lines, f"{len(rows)} pictures: {out}"])
    return _print(args, {"sheet": str(out), "examples": rows}, text)


def _some(spec: str, split: str, args: argparse.Namespace, count: int) -> list[Example]:
    source = open_selected(spec, split, args.data_dir, Selection())
    selection = Selection(count=min(count, len(source)), seed=args.seed)
    chosen = open_selected(spec, split, args.data_dir, selection)
    return [chosen[i] for i in range(len(chosen))]


def run_stats(args: argparse.Namespace) -> int:
    """`speciarl data stats NAME`.

    Raises:
        ValueError: unknown source or split.
    """
    splits = [args.split] if args.split else _splits_of(args.name, args.data_dir)
    content, lines = {}, []
    for split in splits:
        numbers, class_counts = _split_stats(args, split)
        content[split] = {**numbers, "class_counts": class_counts}
        lines.append(f"{split}: {_STATS_LINE.format_map(numbers)}")
        lines += [f"    {count:6d}  {label}" for label, count in class_counts.items()]
    return _print(args, {"source": args.name, "splits": content}, "\n".join(lines))


def _split_stats(args: argparse.Namespace, split: str) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of a split, and the images of each class."""
    import numpy as np

    from speciarl_jax.data.decode import BadImageError, decode_image

    source = open_selected(args.name, split, args.data_dir, Selection())
    counts = collections.Counter(labels_of(source))
    sizes, unreadable = [], 0
    for index in np.random.default_rng(args.seed).permutation(len(source))[: args.sizes]:
        try:
            sizes.append(decode_image(source[int(index)].image).size)
        except BadImageError:
            unreadable += 1
    width, height = np.median(sizes, axis=0).tolist() if sizes else (0, 0)
    numbers = {
        "images": len(source),
        "classes": len(counts),
        "smallest_class": min(counts.values()),
        "largest_class": max(counts.values()),
        "median_width_px": round(width),
        "median_height_px": round(height),
        "measured": len(sizes) + unreadable,
        "unreadable": unreadable,
    }
    return numbers, dict(sorted(counts.items()))
