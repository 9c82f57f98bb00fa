"""The field guide's tree of names: domain > family > genus > species.

Every species is named `modifier genus`; eleven modifiers serve all domains and stand for visible
parts (colour: scarlet, golden, azure, violet, snowy, sooty, russet; pattern: banded, spotted,
pied, crowned). In each genus every colour belongs to exactly two species, one plain and one
patterned, so neither colour nor pattern alone names the species.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources

from speciarl_jax.types import Taxon


@dataclasses.dataclass(frozen=True)
class Species:
    """One leaf of the tree: "banded heron" of genus "heron", family "wader", domain "bird".

    Attributes:
        parts: Ordered (part, words) pairs: colour, pattern, the family's part, the genus's part.
    """

    name: str
    genus: str
    family: str
    domain: str
    parts: tuple[tuple[str, str], ...]


def load_tree() -> Taxon:
    """Returns the raw tree of `taxonomy.json`: nodes with name, synonyms, level, children."""
    text = (resources.files(__package__) / "taxonomy.json").read_text(encoding="utf-8")
    tree: Taxon = json.loads(text)
    return tree


@functools.cache
def load_species() -> Mapping[str, tuple[Species, ...]]:
    """Species by domain in the order of the packaged `taxonomy.json`, which is read once."""
    return {
        domain["name"]: tuple(
            Species(
                name=node["name"],
                genus=genus["name"],
                family=family["name"],
                domain=domain["name"],
                parts=tuple(node["parts"].items()),
            )
            for family in domain["children"]
            for genus in family["children"]
            for node in genus["children"]
        )
        for domain in load_tree()["children"]
    }
