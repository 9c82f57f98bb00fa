"""Which runs the evidence consists of, in order of worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of docs/results.md.

    Attributes:
        title: as in the table.
        argument: of ``configs/baselines.py``, without `tiny` and the seed.
        num_seeds: runs of it.
        paper: published specificity / correctness / HM, fine-grained, or what it says.
    """

    title: str
    argument: str
    num_seeds: int = 3
    paper: str = ""


DYNAMIC = "row=speciarl"
ROWS = (
    Row("zero-shot", "row=zero_shot", 5, ".742 / .846 / .790"),
    Row("asked for the exact name", "row=be_specific", 5, ".816 / .832 / .822"),
    Row("best of 64 of the base", "row=best_of_64", 3, ".889 / .984 / .933"),
    Row("SFT on the names", "row=sft", 5, ".935 / .807 / .866"),
    Row("binary reward (RFT)", "row=binary", 5, ".875 / .785 / .825"),
    Row("static reward, scale1", "row=scale1", 5, "HM .015 to .058 below dynamic"),
    Row("static reward, scale2", "row=scale2", 5, "likewise"),
    Row("static reward, scale3", "row=scale3", 5, "likewise"),
    Row("**dynamic, N=10, GRPO**", DYNAMIC, 5, ".920 / .848 / .883"),
    Row("dynamic, N=5", "row=speciarl,n=5", 5, "HM .883"),
    Row("dynamic, N=15", "row=speciarl,n=15", 5, "HM .824"),
    Row("N=15, bar by support .3 N", "row=speciarl,n=15,support=0.3", 5),
    Row("N=15, bar by support m=2", "row=speciarl,n=15,support=2", 5),
    Row("N=10, bar by support .3 N", "row=speciarl,support=0.3", 5),
    Row("Dr.GRPO, dynamic", "row=speciarl,algo=dr_grpo"),
    Row("Dr.GRPO, binary", "row=binary,algo=dr_grpo"),
    Row("DAPO, dynamic", "row=speciarl,algo=dapo"),
    Row("DAPO, binary", "row=binary,algo=dapo"),
    Row("DAPO with dynamic sampling, dynamic", "row=speciarl,algo=dapo_dynamic"),
    Row("DAPO with dynamic sampling, binary", "row=binary,algo=dapo_dynamic"),
    Row("label noise .05", "row=speciarl,noise=0.05"),
    Row("label noise .10", "row=speciarl,noise=0.10"),
    Row("label noise .25", "row=speciarl,noise=0.25"),
    Row("85 pictures (128 of 3,000)", "row=speciarl,images=128"),
    Row("682 pictures (1,024)", "row=speciarl,images=1024"),
    Row("1,365 pictures (2,048)", "row=speciarl,images=2048"),
    Row("trained on aircraft", "row=speciarl,train=aircraft"),
    Row("trained on flowers", "row=speciarl,train=flowers"),
    Row("trained on dogs (pets)", "row=speciarl,train=pets"),
    Row("trained on all four", "row=speciarl,train=mixed"),
)
# Their first three seeds come first, seed by seed; then their others; then all else.
_FIRST = (
    DYNAMIC,
    "row=binary",
    "row=speciarl,n=15",
    "row=speciarl,n=15,support=0.3",
    "row=zero_shot",
    "row=be_specific",
    "row=sft",
    "row=scale1",
    "row=speciarl,support=0.3",
    "row=speciarl,n=5",
)


def in_order() -> Iterator[tuple[Row, int]]:
    """Every (row, seed), the most telling first."""
    by_argument = {row.argument: row for row in ROWS}
    first = [by_argument[argument] for argument in _FIRST]
    others = [row for row in ROWS if row.argument not in _FIRST]
    for rows, seeds in ((first, range(1)), (others, range(1)), (first, range(1, 3))):
        yield from ((row, seed) for seed in seeds for row in rows)
    for seed in range(1, 5):
        done = 3 if seed < 3 else 0  # of `first`, whose seeds 1 and 2 came above
        rows = others if done else [*first, *others]
        yield from ((row, seed) for row in rows if seed < row.num_seeds)
