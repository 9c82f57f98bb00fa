"""Where answers stand in a tree of names: how narrow they are, and how near when they are wrong."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from speciarl_jax.judge.offline.name_trees import Node
from speciarl_jax.judge.offline.taxonomy import canonical, is_abstention
from speciarl_jax.scoring.predictions import Prediction

ABSTAINED, UNKNOWN = "none given", "name not in the tree"
RIGHT, UNRELATED = "right", "nothing shared"


@dataclasses.dataclass
class Confusion:
    """Counts of answers by the level they name and by what they share with the truth.

    Relations are `RIGHT` (on the truth's own path), then the narrowest level that a wrong answer
    shares with the truth, narrow to broad, then `UNRELATED`.
    """

    levels: list[str]  # of the tree from broad to narrow, then `ABSTAINED` and `UNKNOWN`
    relations: list[str]
    counts: collections.Counter[tuple[str, str]]  # answers by (level, relation)
    skipped: int  # answers whose ground truth the tree does not know


class NameTree:
    """Look-up of names and of what two of them have in common."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Indexes the nodes (`offline.name_trees.read_any` reads them)."""
        self._nodes = nodes
        self._by_name: dict[str, list[int]] = {}
        for index, node in enumerate(nodes):
            for name in {canonical(t) for t in (node.name, *node.synonyms)} - {""}:
                self._by_name.setdefault(name, []).append(index)
        self._paths = [self._path(i) for i in range(len(nodes))]

    def _path(self, index: int) -> dict[int, int]:
        """The node and all above it, with their distance."""
        path, queue = {index: 0}, [index]
        for node in queue:
            for parent in self._nodes[node].parents:
                if parent not in path:
                    path[parent] = path[node] + 1
                    queue.append(parent)
        return path

    def levels(self) -> list[str]:
        """Names of the levels, broad to narrow."""
        depth: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            if node.level:
                distance = max(self._paths[index].values())
                depth[node.level] = max(distance, depth.get(node.level, 0))
        return sorted(depth, key=depth.__getitem__)

    def place(self, ground_truth: str, answer: str) -> tuple[str, str] | None:
        """(level named, relation) of an answer, or None if the truth is not in the tree."""
        truths = self._by_name.get(canonical(ground_truth), [])
        if not truths:
            return None
        if is_abstention(answer):
            return ABSTAINED, RIGHT
        readings = self._by_name.get(canonical(answer), [])
        if not readings:
            return UNKNOWN, UNRELATED
        pairs = [(t, s) for t in truths for s in readings]
        _, level, relation = min(self._relation(t, s) for t, s in pairs)
        return level, relation

    def _relation(self, truth: int, said: int) -> tuple[int, str, str]:
        """(distance, level named, relation); distance 0 is right."""
        level = self._nodes[said].level or UNKNOWN
        if said in self._paths[truth] or truth in self._paths[said]:
            return 0, level, RIGHT
        shared = self._paths[truth].keys() & self._paths[said].keys()
        shared = {s for s in shared if self._nodes[s].level}
        if not shared:
            return len(self._nodes) + 1, level, UNRELATED
        nearest = min(shared, key=self._paths[truth].__getitem__)
        return 1 + self._paths[truth][nearest], level, f"same {self._nodes[nearest].level}"

    def confusion(self, predictions: Iterable[Prediction]) -> Confusion:
        """Counts the answers; format failures have none and do not take part."""
        answered = [(p.ground_truth, p.prediction) for p in predictions if p.prediction is not None]
        places = [self.place(truth, answer) for truth, answer in answered]
        counts = collections.Counter(place for place in places if place is not None)
        levels = self.levels()
        relations = [RIGHT, *(f"same {level}" for level in reversed(levels)), UNRELATED]
        used = {relation for _, relation in counts}
        return Confusion(
            [*levels, ABSTAINED, UNKNOWN],
            [r for r in relations if r in used],
            counts,
            places.count(None),
        )
