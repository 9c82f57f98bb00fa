"""How good a judge is: agreement with hand-made labels, kappa, confusion, tokens, latency."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.files import whole_file
from speciarl_jax.judge.base import Outcome, Pair
from speciarl_jax.judge.pairs_file import outcome_json, read_pairs
from speciarl_jax.judge.vote import make_judge
from speciarl_jax.types import Category, JsonObject, Verdict

SHIPPED_PAIRS = Path(__file__).parent / "data" / "labelled_pairs.jsonl"


def cohen_kappa(pairs: Sequence[tuple[Category, Category]], is_weighted: bool = False) -> float:
    """Agreement beyond chance of two raters, (p_o - p_e) / (1 - p_e).

    Args:
        pairs: (first rater, second rater) for each item; at least one.
        is_weighted: count a disagreement by its squared distance on the ladder, so that
            neighbours are half forgiven (quadratic weights).

    Returns:
        1 for full agreement, 0 for chance, below 0 for worse than chance; 1 if both raters used
        one and the same label throughout.

    Source: Cohen 1960, Educational and Psychological Measurement 20(1); weights: Cohen 1968.
    """
    count = len(pairs)
    rows = [sum(first == rung for first, _ in pairs) / count for rung in Category]
    columns = [sum(second == rung for _, second in pairs) / count for rung in Category]
    observed = sum(_distance(first, second, is_weighted) for first, second in pairs) / count
    expected = sum(
        rows[i] * columns[j] * _distance(i, j, is_weighted) for i in Category for j in Category
    )
    return 1.0 if expected == 0 else 1.0 - observed / expected


def _distance(first: int, second: int, is_weighted: bool) -> float:
    """Disagreement of two labels."""
    return float((first - second) ** 2) if is_weighted else float(first != second)


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """What `speciarl judge eval` prints.

    Attributes:
        num_pairs, num_failed: pairs asked, pairs without a label (left out of the rest).
        agreement: share of equal labels.
        kappa, weighted_kappa: see `cohen_kappa`.
        reward_agreement: share of pairs on which both labels fall on the same side of `specific`.
        confusion: hand-made label -> judge's label -> count.
        by_group: agreement by domain and by trick, as far as the file names them.
        seconds, labels_per_s, latency_s: whole call, and the mean of a request.
        prompt_tokens, completion_tokens: as reported.
    """

    num_pairs: int
    num_failed: int
    agreement: float
    kappa: float
    weighted_kappa: float
    reward_agreement: float
    confusion: dict[str, dict[str, int]]
    by_group: dict[str, float]
    seconds: float = 0.0
    labels_per_s: float = 0.0
    latency_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> JsonObject:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """A table for the terminal."""
        names = [rung.label for rung in Category]
        width = max(map(len, names)) + 2
        lines = [
            f"pairs {self.num_pairs}, failed {self.num_failed}, agreement {self.agreement:.3f}, "
            f"kappa {self.kappa:.3f}, weighted kappa {self.weighted_kappa:.3f}, "
            f"reward agreement {self.reward_agreement:.3f}",
            f"{self.seconds:.1f} s, {self.labels_per_s:.1f} labels/s, {self.latency_s:.3f} s a "
            f"request, {self.prompt_tokens}+{self.completion_tokens} tokens",
            "",
            "hand-made \\ judge".ljust(19) + "".join(name.rjust(width) for name in names),
        ]
        for truth in names:
            counts = (str(self.confusion[truth][said]).rjust(width) for said in names)
            lines.append(truth.ljust(19) + "".join(counts))
        lines.append("")
        lines += [f"{group.ljust(28)} {value:.3f}" for group, value in self.by_group.items()]
        return "\n".join(lines)


def measure(items: Sequence[dict[str, str]], outcomes: Sequence[Outcome]) -> QualityReport:
    """A report of what depends on labels only; seconds and tokens stay 0.

    Args:
        items: objects with a hand-made `category`, perhaps `domain` and `trick`.
        outcomes: the judge's, in the same order.
    """
    both = [
        (item, Category.from_label(item["category"]), outcome.category)
        for item, outcome in zip(items, outcomes, strict=True)
        if isinstance(outcome, Verdict)
    ]
    confusion = {first.label: {second.label: 0 for second in Category} for first in Category}
    groups: dict[str, list[bool]] = {}
    for item, truth, said in both:
        confusion[truth.label][said.label] += 1
        for field in ("domain", "trick"):
            if field in item:
                groups.setdefault(f"{field}/{item[field]}", []).append(truth == said)
    labels = [(truth, said) for _, truth, said in both]
    bar = Category.SPECIFIC
    same_side = sum((truth >= bar) == (said >= bar) for truth, said in labels)
    count = max(1, len(labels))
    return QualityReport(
        num_pairs=len(items),
        num_failed=len(items) - len(labels),
        agreement=sum(truth == said for truth, said in labels) / count,
        kappa=cohen_kappa(labels) if labels else 0.0,
        weighted_kappa=cohen_kappa(labels, is_weighted=True) if labels else 0.0,
        reward_agreement=same_side / count,
        confusion=confusion,
        by_group={name: sum(hits) / len(hits) for name, hits in sorted(groups.items())},
    )


async def evaluate_file(config: JudgeConfig, path: str = "", out: str = "") -> QualityReport:
    """Asks a judge about labelled pairs and compares.

    Args:
        config: the judge; without a cache of its own, so that tokens and latency are real.
        path: JSON lines with `ground_truth`, `answer`, `category`; empty for the shipped set.
        out: if given, every pair with both labels is written there.

    Raises:
        ValueError: the file is not of that form.
        JudgeError: the judge cannot be used.
        OSError: `out` cannot be written; told before anything is asked.
    """
    source = path or str(SHIPPED_PAIRS)
    items = read_pairs(source)
    for number, item in enumerate(items, start=1):
        if "category" not in item:
            raise ValueError(f"{source} pair {number}: expected a category to compare with")
        Category.from_label(item["category"])
    with contextlib.ExitStack() as opened:
        file = None
        if out:  # opened before anything is asked: labels cost money
            partial = opened.enter_context(whole_file(out))
            file = opened.enter_context(partial.open("w", encoding="utf-8"))
        async with make_judge(config) as judge:
            started = time.monotonic()
            outcomes = await judge.label([Pair(i["ground_truth"], i["answer"]) for i in items])
            seconds = time.monotonic() - started
            stats = judge.stats()
        if file is not None:
            for item, outcome in zip(items, outcomes, strict=True):
                file.write(json.dumps({**item, "judged": outcome_json(outcome)}) + "\n")
    return dataclasses.replace(
        measure(items, outcomes),
        seconds=seconds,
        labels_per_s=len(items) / max(seconds, 1e-9),
        latency_s=stats["judge/latency_s"],
        prompt_tokens=int(stats["judge/prompt_tokens"]),
        completion_tokens=int(stats["judge/completion_tokens"]),
    )
