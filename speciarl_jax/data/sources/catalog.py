"""Sources by name: every one gives the same `Example`, by random access.

A spec is ``NAME`` or ``NAME:ARGUMENT``:

    field_guide_birds            rendered on first use   field_guide_birds:train=48,test=8,seed=1
    cub flowers food pets cars aircraft                  built with `speciarl data build`
    flowers:coop=FILE            a CoOp split file instead of the official splits
    folder:PATH                  class folders or a manifest
    hf:PATH                      a Hugging Face dataset directory

Specs joined by `` + `` are a mixture, each with a weight in front if wanted: ``2*cub + flowers``;
see `selection`.
"""

from __future__ import annotations

import dataclasses
import pathlib

from speciarl_jax.data.index import Source
from speciarl_jax.data.sources.coop import CoopSource
from speciarl_jax.data.sources.folder import open_folder
from speciarl_jax.data.sources.records import RecordSource
from speciarl_jax.data.sources.releases import BENCHMARKS
from speciarl_jax.errors import NoSuchSplit

FIELD_GUIDE_DOMAINS = ("birds", "flowers", "aircraft", "dogs")


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """A line of ``speciarl data list``."""

    name: str
    description: str
    splits: tuple[str, ...]
    is_built: bool


def resolve_data_dir(data_dir: str | pathlib.Path | None) -> pathlib.Path:
    """Root of prepared data sets: the given one, or ``~/.cache/speciarl/data`` for None and ""."""
    return pathlib.Path(data_dir or "~/.cache/speciarl/data").expanduser()


def list_sources(data_dir: str | pathlib.Path | None = None) -> list[SourceInfo]:
    """All sources, in the order in which they are shown."""
    from speciarl_jax.data.field_guide.builder import FieldGuide, FieldGuideConfig
    from speciarl_jax.data.sources import benchmarks, builder

    root = resolve_data_dir(data_dir)
    infos = []
    for domain in FIELD_GUIDE_DOMAINS:
        path = root / builder.build_path(FieldGuide, FieldGuideConfig.make(domain))
        splits: tuple[str, ...] = ("train", "validation", "test")
        if domain != "birds":
            splits = splits[1:]
        text = f"rendered {domain}, drawn on first use"
        infos.append(SourceInfo(f"field_guide_{domain}", text, splits, builder.is_built(path)))
    for name, benchmark in BENCHMARKS.items():
        found = benchmarks.finished(name, root)
        is_partial = found is not None and found.parent.name != "full"
        text = benchmark.title + (" (partial build)" if is_partial else "")
        infos.append(SourceInfo(name, text, tuple(benchmark.counts), found is not None))
    splits = ("train", "validation", "test")
    infos.append(SourceInfo("folder:PATH", "class folders, or a manifest file", splits, True))
    infos.append(SourceInfo("hf:PATH", "a Hugging Face dataset directory", splits, True))
    return infos


def open_source(spec: str, split: str, data_dir: str | pathlib.Path | None = None) -> Source:
    """Opens a source, rendering it first if it is a field guide that is not there yet.

    The spec is NAME or NAME:ARGUMENT, see the module, and no mixture.

    Raises:
        ValueError: unknown name, argument or split; data that is missing or damaged.
    """
    name, _, argument = spec.partition(":")
    root = resolve_data_dir(data_dir)
    domain = name.removeprefix("field_guide_")
    if name.startswith("field_guide_") and domain in FIELD_GUIDE_DOMAINS:
        return _open_field_guide(name, domain, argument, split, root)
    if name in BENCHMARKS:
        return _open_benchmark(name, argument, split, root)
    if name == "folder" and argument:
        return open_folder(argument, split)
    if name == "hf" and argument:
        from speciarl_jax.data.sources.hf_dir import open_hf_dir

        return open_hf_dir(argument, split, root)
    known = ", ".join(
        [f"field_guide_{domain}" for domain in FIELD_GUIDE_DOMAINS]
        + [*BENCHMARKS, "folder:PATH", "hf:PATH"]
    )
    raise ValueError(f"data source {spec!r} is unknown: expected one of {known}")


def count_examples(spec: str, split: str, data_dir: str | pathlib.Path | None = None) -> int:
    """Examples of a split; those of benchmarks and field guides are known before they are built.

    Raises:
        NoSuchSplit: it does not have that split.
        ValueError: unknown name or argument; a folder or dataset directory that cannot be opened.
    """
    name, _, argument = spec.partition(":")
    domain = name.removeprefix("field_guide_")
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        counts = dict(benchmark.coop_counts if argument.startswith("coop=") else benchmark.counts)
    elif name.startswith("field_guide_") and domain in FIELD_GUIDE_DOMAINS:
        from speciarl_jax.data.field_guide.builder import FieldGuideConfig

        guide = FieldGuideConfig.make(domain, **parse_options(name, argument))
        counts = {"train": guide.num_train, "validation": guide.num_validation}
        counts |= {"test": guide.num_test}
    else:
        return len(open_source(spec, split, data_dir))
    if not counts.get(split):
        raise NoSuchSplit(f"{spec}: split {split!r} does not exist; it has {', '.join(counts)}")
    return counts[split]


def _open_field_guide(
    name: str, domain: str, argument: str, split: str, root: pathlib.Path
) -> RecordSource:
    from speciarl_jax.data.field_guide.builder import FieldGuide, FieldGuideConfig
    from speciarl_jax.data.sources import builder

    config = FieldGuideConfig.make(domain, **parse_options(name, argument))
    return RecordSource(builder.prepare(FieldGuide, root, config), name, split)


def _open_benchmark(name: str, argument: str, split: str, root: pathlib.Path) -> Source:
    from speciarl_jax.data.sources import benchmarks

    directory = benchmarks.finished(name, root)
    if directory is None:
        raise ValueError(
            f"{name} is not built under {root}: run `speciarl data build {name} --data_dir={root}` "
            "(with --archive=FILE on a machine without internet)"
        )
    key, _, file = argument.partition("=")
    if not argument or argument == "official":
        return RecordSource(directory, name, split)
    if key != "coop" or not file:
        raise ValueError(f"{name}:{argument}: expected {name}, {name}:official or {name}:coop=FILE")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"{name}:{argument}: split {split!r}: expected train, validation or test")
    parts = {part: RecordSource(directory, name, part) for part in BENCHMARKS[name].counts}
    source = CoopSource(parts, file, name, split)
    expected = BENCHMARKS[name].coop_counts.get(split)
    if expected not in (None, len(source)) and directory.parent.name == "full":
        raise ValueError(
            f"split file {file}: {len(source)} images in {split}, the CoOp split has {expected}"
        )
    return source


def parse_options(name: str, argument: str) -> dict[str, float]:
    """``train=200,seed=1`` as numbers."""
    options: dict[str, float] = {}
    for part in filter(None, argument.split(",")):
        key, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError as error:
            raise ValueError(f"{name}:{argument}: {part!r} is not KEY=NUMBER") from error
        is_share = key.strip() == "hard_frac"
        if is_share and not 0 <= number <= 1:
            raise ValueError(f"{name}:{argument}: {part!r}: expected a share between 0 and 1")
        if not is_share and not (0 <= number < 2**31 and number == int(number)):
            raise ValueError(f"{name}:{argument}: {part!r}: expected a whole number of 0 or more")
        options[key.strip()] = number
    return options
