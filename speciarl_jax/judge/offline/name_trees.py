"""Readers of name trees: nested JSON, CSV from coarse to fine, WordNet's noun files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.types import Taxon

# Columns of our other tables: pairs, predictions, metrics.
_NOT_LEVELS = {"ground_truth", "answer", "completion", "prediction", "step", "reward", "image"}


@dataclasses.dataclass(frozen=True)
class Node:
    """One name of the tree.

    Attributes:
        name: the name proper.
        synonyms: other names of the very same thing.
        level: name of the rung (`species`, `genus`), for messages only.
        parents: indices of the nodes one level up; more than one in WordNet.
    """

    name: str
    synonyms: tuple[str, ...]
    level: str
    parents: tuple[int, ...]


def read_any(path: Path) -> list[Node]:
    """Chooses the reader by what `path` is: a WordNet folder, a `.csv` or a `.json` file.

    Raises:
        JudgeError: nothing there, or not of its form.
    """
    if path.is_dir():
        return read_wordnet(path)
    return read_csv(path) if path.suffix.lower() == ".csv" else read_json(path)


def _read_text(path: Path) -> str:
    """The file's text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(
            f"taxonomy {path}: cannot be read ({error}); set judge.taxonomy"
        ) from error


def read_json(path: Path) -> list[Node]:
    """Reads `{"name", "synonyms", "level", "children"}` objects, nested; a list of roots is fine.

    Raises:
        JudgeError: not JSON, or an object without a name.
    """
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise JudgeError(f"taxonomy {path}: not valid JSON ({error})") from error
    nodes: list[Node] = []
    stack: list[tuple[Taxon, tuple[int, ...]]] = [
        (root, ()) for root in (value if isinstance(value, list) else [value])
    ]
    while stack:
        item, parents = stack.pop()
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise JudgeError(
                f"taxonomy {path}: expected objects with a name, got {str(item)[:60]!r}"
            )
        synonyms, children = item.get("synonyms") or [], item.get("children") or []
        for field, found in (("synonyms", synonyms), ("children", children)):
            if not isinstance(found, list):
                raise JudgeError(
                    f"taxonomy {path}: expected a list of {field} of {item['name'][:60]!r}, got "
                    f"{str(found)[:60]!r}"
                )
        names = tuple(str(name) for name in synonyms)
        nodes.append(Node(item["name"], names, str(item.get("level") or ""), parents))
        stack.extend((child, (len(nodes) - 1,)) for child in reversed(children))
    return nodes


def read_csv(path: Path) -> list[Node]:
    """Reads a table with a header, one column per level from coarse to fine, one row per leaf.

    A column called `synonyms` holds other names of the row's finest name, split by `|`. An empty
    cell skips that level.

    Raises:
        JudgeError: no header, no column besides `synonyms`, a table of something else.
    """
    rows = csv.DictReader(_read_text(path).splitlines())
    levels = [name for name in rows.fieldnames or () if name and name.strip().lower() != "synonyms"]
    if not levels:
        raise JudgeError(f"taxonomy {path}: expected a header such as domain,family,genus,species")
    if strange := sorted({name.strip().lower() for name in levels} & _NOT_LEVELS):
        raise JudgeError(
            f"taxonomy {path}: expected names by level such as domain,family,genus,species, got a "
            f"column {strange[0]!r}; set judge.taxonomy to a tree of names"
        )
    synonym_column = next((n for n in rows.fieldnames or () if n.strip().lower() == "synonyms"), "")
    index: dict[tuple[str, ...], int] = {}
    nodes: list[Node] = []
    for row in rows:
        way: tuple[str, ...] = ()
        for level in levels:
            name = (row[level] or "").strip()
            if not name:
                continue
            parents = (index[way],) if way else ()
            way = (*way, name)
            if way not in index:
                index[way] = len(nodes)
                nodes.append(Node(name, (), level, parents))
        names = tuple(n.strip() for n in (row.get(synonym_column) or "").split("|") if n.strip())
        if way and names:
            leaf = nodes[index[way]]
            merged = tuple(dict.fromkeys(leaf.synonyms + names))
            nodes[index[way]] = dataclasses.replace(leaf, synonyms=merged)
    if nodes and not any(char.isalpha() for node in nodes for char in node.name):
        raise JudgeError(
            f"taxonomy {path}: expected names by level, got numbers such as {nodes[0].name[:60]!r}"
        )
    return nodes


def read_wordnet(folder: Path) -> list[Node]:
    """Reads WordNet's `data.noun`: one node per synset, its hypernyms are the parents.

    Raises:
        JudgeError: the folder has no `data.noun`, or a line of it is not of the format.

    Source: WordNet 3.x file format, wndb(5WN).
    """
    path = folder / "data.noun"
    offsets: dict[str, int] = {}
    raw: list[tuple[list[str], list[str]]] = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.startswith("  ") or not line.strip():
            continue
        try:
            offset, words, parents = _synset(line)
        except (ValueError, IndexError) as error:
            raise JudgeError(f"taxonomy {path} line {number}: not a WordNet synset") from error
        offsets[offset] = len(raw)
        raw.append((words, parents))
    return [
        Node(words[0], tuple(words[1:]), "", tuple(offsets[p] for p in parents if p in offsets))
        for words, parents in raw
    ]


def _synset(line: str) -> tuple[str, list[str], list[str]]:
    """Offset, words and hypernym offsets (`@` a kind of, `@i` an instance of) of one line."""
    fields = line.split("|", 1)[0].split()
    count = int(fields[3], 16)
    words = [fields[4 + 2 * i].replace("_", " ") for i in range(count)]
    start = 4 + 2 * count
    pointers = range(start + 1, start + 1 + 4 * int(fields[start]), 4)
    parents = [fields[i + 1] for i in pointers if fields[i] in ("@", "@i")]
    return fields[0], words, parents
