"""The offline judge: a tree of names decides the category, without a model.

The ladder as steps in a tree, for the ground truth `scarlet finch`:

    bird            generic        two or more levels up
      finch         less_specific  the parent
        scarlet finch              specific, and so is every synonym of it
          (a child of it)          more_specific
        golden finch               wrong, like everything that is not on the truth's own path
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from speciarl_jax.errors import JudgeError
from speciarl_jax.judge.base import UnknownTruthError
from speciarl_jax.judge.offline.name_trees import Node, read_any
from speciarl_jax.judge.parse import fold, normalize
from speciarl_jax.types import Category

_ARTICLES = frozenset({"a", "an", "the"})
_ABSTENTION = re.compile(
    r"(none|unknown|unsure|uncertain|unidentified|unidentifiable|unclear|undetermined|"
    r"indeterminate|idk|n a|na|no idea|no answer|abstain|none of (these|the above)|"
    r"not (identifiable|known|clear|determinable)|"
    r"(i )?(do not|don t|dont|did not|didn t) know|"
    r"(i am |i m |im )?(really )?(not (sure|certain)|unsure|uncertain)|"
    r"(i |it )?(cannot|can not|can t|cant|could not|couldn t|couldnt) "
    r"(be )?(tell|told|say|said|determine|determined|identify|identified|know|known|decide|see)|"
    r"(i am |i m |im )?unable to (tell|say|determine|identify|decide))"
    r"( (for sure|with certainty|exactly|it|this|that|what|which|who|the|a|an|from|in|by|is|are|"
    r"at all|here|image|photo|picture|object|thing|species|bird|kind|type|exact|shown|of|name))*"
)


def canonical(text: str) -> str:
    """Normalised text without articles, with the last word in the singular.

    The plural rule is crude, but the same for the tree and for the answer.
    """
    words = [word for word in normalize(text).split() if word not in _ARTICLES]
    if words:
        words[-1] = _singular(words[-1])
    return " ".join(words)


def _singular(word: str) -> str:
    """`finches` -> `finch`, `lilies` -> `lily`, `owls` -> `owl`; `iris` and `grass` keep theirs."""
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    return word.removesuffix("s")


def is_abstention(answer: str) -> bool:
    """True if the answer declines to name anything (`none`, `I don't know`, `cannot tell`)."""
    return _ABSTENTION.fullmatch(normalize(answer)) is not None


class TaxonomyJudge:
    """Labels pairs by position in a tree of names; pure and deterministic.

    A name may stand at several nodes (homonyms); the best reading counts. An answer must be one
    name as a whole: several options at once match no name and are wrong.
    """

    def __init__(self, nodes: list[Node], source: str) -> None:
        """Indexes the names; `source` says in messages where the tree came from.

        Raises:
            JudgeError: the tree holds no name.
        """
        if len(nodes) < 2:
            found = repr(nodes[0].name)[:60] if nodes else "none"
            raise JudgeError(
                f"taxonomy {source}: expected a tree of names, got {found}; check the file"
            )
        self._nodes = nodes
        self._source = source
        self._by_name: dict[str, list[int]] = {}
        for index, node in enumerate(nodes):
            for name in {canonical(text) for text in (node.name, *node.synonyms)} - {""}:
                self._by_name.setdefault(name, []).append(index)

    @classmethod
    def from_path(cls, path: str | Path) -> TaxonomyJudge:
        """Reads a `.json` tree, a `.csv` table, or a folder with WordNet's noun files.

        Raises:
            JudgeError: the file is missing or not of its form.
        """
        return cls(read_any(Path(path)), str(path))

    def __len__(self) -> int:
        return len(self._nodes)

    def category(self, ground_truth: str, answer: str) -> Category:
        """Places the answer on the ladder.

        Raises:
            UnknownTruthError: the tree does not know the ground truth, so nothing true can be
                said about an answer that is neither equal to it nor an abstention.
        """
        if is_abstention(answer):
            return Category.ABSTAIN
        truth, said = canonical(ground_truth), canonical(answer)
        truths, saids = self._find(ground_truth, truth), self._find(answer, said)
        is_other = truths and saids and not set(truths) & set(saids)
        if said and truth == said and not is_other:
            return Category.SPECIFIC
        if not truths:
            raise UnknownTruthError(
                f"ground truth {ground_truth!r} is not in taxonomy {self._source}: "
                "add it there, or judge by a model (judge.kind=endpoint)"
            )
        relations = [
            self._relation(truth_node, said_node) for truth_node in truths for said_node in saids
        ]
        return max(relations, default=Category.WRONG)

    def _find(self, text: str, name: str) -> list[int]:
        """Nodes of a text's canonical `name`; of homonyms that marks tell apart, the one meant."""
        nodes = self._by_name.get(name, [])
        spelled = [
            index
            for index in nodes
            if len(nodes) > 1
            and fold(text) in map(fold, (self._nodes[index].name, *self._nodes[index].synonyms))
        ]
        return spelled or nodes

    def describe(self) -> str:
        """What this tree can tell, for whoever starts the judge: one line.

        Classes are the names with nothing below them; depth counts the names on the longest way
        down to one of them. The parent of a class is less specific, what lies above is generic.
        """
        inner = {parent for node in self._nodes for parent in node.parents}
        classes = [index for index in range(len(self._nodes)) if index not in inner]
        parents = {index: self._nodes[index].parents for index in classes}
        has_parent = any(parents.values())
        has_more = any(self._nodes[up].parents for ups in parents.values() for up in ups)
        depth = max((1 + self._height(index) for index in classes), default=1)
        missing = [
            name for name, has in (("generic", has_more), ("less specific", has_parent)) if not has
        ]
        told = f"no {' or '.join(missing)} rung" if missing else "generic and less specific rungs"
        return f"{len(classes)} classes, depth {depth}: {told}"

    def _height(self, index: int) -> int:
        """Names on the longest way up; safe against loops in a user's tree."""
        seen, level, height = {index}, set(self._nodes[index].parents), 0
        while level := level - seen:
            seen |= level
            height += 1
            level = {parent for node in level for parent in self._nodes[node].parents}
        return height

    def _relation(self, truth: int, said: int) -> Category:
        """Category of naming node `said` where node `truth` is right."""
        if said == truth:
            return Category.SPECIFIC
        if said in self._nodes[truth].parents:
            return Category.LESS_SPECIFIC
        if said in self._ancestors(truth):
            return Category.GENERIC
        if truth in self._ancestors(said):
            return Category.MORE_SPECIFIC
        return Category.WRONG

    def _ancestors(self, index: int) -> Iterator[int]:
        """Every node above `index`, nearest first; safe against loops in a user's tree."""
        seen, queue = {index}, list(self._nodes[index].parents)
        for parent in queue:
            if parent not in seen:
                seen.add(parent)
                yield parent
                queue.extend(self._nodes[parent].parents)
