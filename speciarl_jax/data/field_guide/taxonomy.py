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
    """One leaf of the tree.

    Attributes:
        name: Modifier and genus, such as "banded heron".
        genus: Genus name, such as "heron".
        family: Family name, such as "wader".
        domain: Domain name, such as "bird".
        parts: Ordered (part, words) pairs: colour, pattern, the family's part, the genus's part.
    """

    name: str
    genus: str
    family: str
    domain: str
    parts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """All species by domain, in the order of `taxonomy.json`."""

    domains: Mapping[str, tuple[Species, ...]]

    @property
    def species(self) -> tuple[Species, ...]:
        """All species of all domains."""
        return tuple(one for members in self.domains.values() for one in members)

    def find(self, name: str) -> Species:
        """Returns the species called `name`.

        Raises:
            KeyError: No species has that name.
        """
        for one in self.species:
            if one.name == name:
                return one
        raise KeyError(f"no species {name!r} in the field guide")


def load_tree() -> Taxon:
    """Returns the raw tree of `taxonomy.json`: nodes with name, synonyms, level, children."""
    text = (resources.files(__package__) / "taxonomy.json").read_text(encoding="utf-8")
    tree: Taxon = json.loads(text)
    return tree


@functools.cache
def load_taxonomy() -> Taxonomy:
    """Returns the species of the field guide, read once from the packaged `taxonomy.json`."""
    domains: dict[str, tuple[Species, ...]] = {}
    for domain in load_tree()["children"]:
        domains[domain["name"]] = tuple(
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
    return Taxonomy(domains)
