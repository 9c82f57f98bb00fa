"""Which examples of which sources a run uses: subsets and mixtures, by seed and reproducible.

A subset of 128 examples is part of the subset of 1,024 with the same seed, so ablations over the
number of images differ by images added, not by images swapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from speciarl_jax.data.index import Source
from speciarl_jax.data.sources.catalog import open_source
from speciarl_jax.types import Example

_WEIGHT = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*\*\s*(.+)$")


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to take from a source.

    Attributes:
        count: number of examples, 0 for all.
        include_classes: only these ground truths (case and white space aside); empty for all.
        exclude_classes: not these.
        seed: of the subset.
        held_out: number of examples, of all classes, that are set aside: the last in the order in
            which subsets grow, so that a subset stays what it is without them.
        takes_held_out: those instead of the rest.
    """

    count: int = 0
    include_classes: tuple[str, ...] = ()
    exclude_classes: tuple[str, ...] = ()
    seed: int = 42
    held_out: int = 0
    takes_held_out: bool = False

    def __post_init__(self) -> None:
        """Refuses a number out of range."""
        if self.count < 0:
            raise ValueError(f"selection with count={self.count}: expected count >= 0")


class Subset:
    """Some examples of a source."""

    def __init__(self, source: Source, places: Sequence[int]) -> None:
        """Takes positions in `source`."""
        self._source, self._places = source, np.asarray(places, np.int64)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """The index-th selected example."""
        return self._source[int(self._places[index])]

    def labels(self) -> list[str]:
        """Ground truth of every example."""
        labels = labels_of(self._source)
        return [labels[place] for place in self._places]

    def fingerprint(self) -> str:
        """Changes with the source and the places."""
        return f"{_fingerprint(self._source)}[{hashlib.sha256(self._places.tobytes()).hexdigest()}]"


class Mixture:
    """Several sources one after the other; the loader shuffles."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Joins them."""
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """The index-th example of the joined list."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._sources[number][index - start]

    def labels(self) -> list[str]:
        """Ground truth of every example."""
        return [label for source in self._sources for label in labels_of(source)]

    def fingerprint(self) -> str:
        """Changes with any of the sources."""
        return "+".join(_fingerprint(source) for source in self._sources)


def _fingerprint(source: Source) -> str:
    if hasattr(source, "fingerprint"):
        return str(source.fingerprint())
    ids = "\n".join(source[i].prompt_id for i in range(len(source)))
    return hashlib.sha256(ids.encode()).hexdigest()


def labels_of(source: Source) -> list[str]:
    """Ground truths of a source, without reading images where it knows them."""
    if hasattr(source, "labels"):
        return list(source.labels())
    return [source[i].ground_truth for i in range(len(source))]


def select(source: Source, selection: Selection) -> Source:
    """Applies a selection: classes, then count.

    Raises:
        ValueError: more examples asked for than there are, or nothing left.
    """
    if selection == Selection(seed=selection.seed):
        return source
    places = list(range(len(source)))
    if selection.held_out:
        if selection.held_out >= len(places):
            raise ValueError(
                f"holding {selection.held_out} validation examples out of {len(places)} leaves "
                "nothing to train on; lower data.num_validation"
            )
        held_out = set(_ranked(selection.seed, places)[-selection.held_out :])
        places = [place for place in places if (place in held_out) == selection.takes_held_out]
    if selection.include_classes or selection.exclude_classes:
        wanted_places = _filter_classes([_key(label) for label in labels_of(source)], selection)
        places = [place for place in places if place in wanted_places]
    wanted = selection.count or len(places)
    if wanted > len(places):
        raise ValueError(
            f"selection of {wanted} examples: only {len(places)} are available"
            f"{' beside those held out for validation' if selection.held_out else ''}; lower "
            "data.num_train"
        )
    if wanted < len(places):
        places = sorted(_ranked(selection.seed, places)[:wanted])
    if not places:
        raise ValueError("selection leaves no examples; widen data.include_classes or the like")
    return Subset(source, places)


def _key(label: str) -> str:
    return " ".join(label.casefold().split())


def _ranked(seed: int, places: list[int]) -> list[int]:
    """The order in which a subset grows."""
    ranks = np.argsort([_draw(seed, place) for place in places], kind="stable")
    return [places[rank] for rank in ranks]


def _filter_classes(labels: list[str], selection: Selection) -> set[int]:
    include = {_key(label) for label in selection.include_classes}
    exclude = {_key(label) for label in selection.exclude_classes}
    return {
        place
        for place, label in enumerate(labels)
        if (not include or label in include) and label not in exclude
    }


def _check_classes(sources: Sequence[Source], selection: Selection) -> None:
    wanted = {_key(c) for c in (*selection.include_classes, *selection.exclude_classes)}
    if not wanted:
        return
    unknown = wanted - {_key(label) for source in sources for label in labels_of(source)}
    if unknown:
        raise ValueError(
            f"class {min(unknown)!r} does not occur in the data; `speciarl data stats` lists the "
            "classes"
        )


def _draw(seed: int, place: int) -> int:
    """A random number for a position that depends on nothing else."""
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def parse_mixture(spec: str) -> list[tuple[float, str]]:
    """``2*cub + flowers`` -> [(2.0, "cub"), (1.0, "flowers")].

    Raises:
        ValueError: an empty part or a weight of 0.
    """
    parts: list[tuple[float, str]] = []
    for piece in re.split(r"\s\+\s", spec):
        match = _WEIGHT.match(piece)
        weight, name = (float(match[1]), match[2].strip()) if match else (1.0, piece.strip())
        if not name or weight <= 0:
            raise ValueError(
                f"data.source={spec!r}: expected SPEC or WEIGHT*SPEC joined by ' + ', weights > 0"
            )
        parts.append((weight, name))
    return parts


def open_selected(
    spec: str,
    split: str,
    data_dir: str | pathlib.Path | None,
    selection: Selection,
    held_out: Mapping[str, int] | None = None,
) -> Source:
    """Opens a source or a mixture (see `catalog` and `parse_mixture`) and selects from it.

    In a mixture, classes are chosen within each source; the total (`count`, or all of the largest
    mixture that the weights allow without repeating an example) is divided by weight.

    Args:
        spec: the source, or the mixture.
        split: of each.
        data_dir: root of prepared data sets.
        selection: what to take.
        held_out: examples of a part, by its own spec, that are set aside (`Selection.held_out`).

    Raises:
        ValueError: see `open_source`, `select`, `parse_mixture`.
    """
    parts = parse_mixture(spec)
    sources = [open_source(name, split, data_dir) for _, name in parts]
    _check_classes(sources, selection)
    wishes = [
        dataclasses.replace(selection, held_out=held_out[name])
        if held_out and name in held_out
        else selection
        for _, name in parts
    ]
    if len(sources) == 1:
        return select(sources[0], wishes[0])
    sources = [
        select(source, dataclasses.replace(wish, count=0))
        for source, wish in zip(sources, wishes, strict=True)
    ]
    weights, sizes = [weight for weight, _ in parts], [len(source) for source in sources]
    quotas = divide(weights, sizes, selection.count)
    chosen = [
        select(source, Selection(count=quota, seed=selection.seed))
        for source, quota in zip(sources, quotas, strict=True)
        if quota
    ]
    return Mixture(chosen)


def divide(weights: Sequence[float], sizes: Sequence[int], count: int = 0) -> list[int]:
    """Examples from each source of a mixture: by weight (> 0), largest remainder first.

    They sum up to `count`; 0 takes the most that the weights and sizes allow.

    Raises:
        ValueError: a source is too small for its part.
    """
    total_weight = sum(weights)
    most = min(
        math.floor(size * total_weight / weight + 1e-9)
        for size, weight in zip(sizes, weights, strict=True)
    )
    wanted = count or most
    exact = [wanted * weight / total_weight for weight in weights]
    quotas = [math.floor(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for i in by_remainder[: wanted - sum(quotas)]:
        quotas[i] += 1
    for number, (quota, size) in enumerate(zip(quotas, sizes, strict=True)):
        if quota > size:
            raise ValueError(
                f"mixture of {wanted} examples: source number {number + 1} would give {quota} and "
                f"has {size}; lower data.num_train or its weight"
            )
    return quotas
