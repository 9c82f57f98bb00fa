"""Drill: proves that a refactor changed no number. `make witness BASE=COMMIT`

    python -m tests.drills.witness --base=COMMIT [--only=NAME ...] [--keep=DIR] [--smoke] [--json]

Trains the runs of `tests.drills.witness_runs` with the trainer of BASE and with that of the working
tree, on this machine, in this environment, from the shipped policy of BASE, and compares every
deterministic number that they leave bit for bit: all rows of metrics.jsonl, eval/*/metrics.json,
rollouts/*.jsonl. Exit code 1 if a number differs or is gone, a run fails, or a run is no witness
because what it exercises was not at work; numbers that are new are only named.

Both trees are copied into .witness/ and run from there, so that editing may go on. Results stay
there by run, BASE's by commit and the tree's by content: a second call runs what is missing. About
seven minutes for each tree on two cores, `--smoke` eight more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.drills.witness_runs import RUNS, SMOKE, Evidence, Run, unmet
from tests.drills.witness_trees import ROOT, RunFailedError, Tree, open_trees, result_of

# Written here a second time: a refactor must not be able to excuse a number from the comparison.
NONDETERMINISTIC = (
    *("time/", "throughput/", "goodput/", "memory/", "judge/"),
    "rollout/recompilations",
)
Key = tuple[str, str]  # (place, name): ("step 3", "policy/loss")
Values = dict[Key, Any]


def values_of(found: Evidence) -> Values:
    """Every deterministic number or text of a run, in the order in which they came to be."""
    values: Values = {}
    for number, row in enumerate(found.rows):
        place = f"step {row.get('step', f'of row {number + 1}')}"
        kept = {k: v for k, v in row.items() if not k.startswith(NONDETERMINISTIC)}
        values |= {(place, name): value for name, value in kept.items()}
        lines = found.rollouts.get(f"step_{row.get('step', 0):06d}", [])
        for index, line in enumerate(lines):
            values |= {(place, f"rollouts/{index}/{k}"): v for k, v in line.items()}
    for name, content in found.evals.items():
        values |= {(f"eval/{name}", path): value for path, value in _leaves(content, "")}
    return values


def _leaves(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in parts:
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def same(a: Any, b: Any) -> bool:
    """Equal bits. NaN is NaN, 0.0 is not -0.0, 1 is 1.0; None stands for what was not finite."""
    if _is_number(a) and _is_number(b):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        return struct.pack("<d", a) == struct.pack("<d", b)
    return type(a) is type(b) and bool(a == b)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass
class Comparison:
    """Two runs side by side.

    Attributes:
        count: values in BASE.
        differences: (place, name, BASE's value, the tree's value).
        missing: what only BASE has; a place that is gone altogether stands once, as (place, "").
        new: what only the tree has, in the same form.
    """

    count: int
    differences: list[tuple[str, str, Any, Any]]
    missing: list[Key]
    new: list[Key]

    @property
    def is_equal(self) -> bool:
        """Whether the tree has every value of BASE."""
        return not self.differences and not self.missing

    def text(self) -> str:
        """One line: the first difference, how many more, names that went or came."""
        parts = []
        if self.differences:
            place, name, base, tree = self.differences[0]
            more = len(self.differences) - 1
            parts.append(f"DIFFERS at {place} {name}: {base!r}, tree {tree!r} (and {more} more)")
        if self.missing:
            parts.append(f"GONE: {_names(self.missing)}")
        if self.new:
            parts.append(f"new: {_names(self.new)}")
        return "; ".join(parts if not self.is_equal else ["equal", *parts])


def compare(base: Values, tree: Values) -> Comparison:
    """All values of two runs."""
    differences = [
        (*key, value, tree[key])
        for key, value in base.items()
        if key in tree and not same(value, tree[key])
    ]
    return Comparison(len(base), differences, _only(base, tree), _only(tree, base))


def _only(a: Values, b: Values) -> list[Key]:
    places = {place for place, _ in b}
    found = [
        (place, name if place in places else "") for place, name in a if (place, name) not in b
    ]
    return list(dict.fromkeys(found))


def _names(keys: Sequence[Key]) -> str:
    """Names without their places, each once; a whole place by its own name."""
    names = list(dict.fromkeys(name or place for place, name in keys))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def choose(only: Sequence[str], is_smoke: bool) -> list[Run]:
    """The runs, each after the one that it is held against.

    Raises:
        ValueError: an unknown name.
    """
    known = {run.name: run for run in (*RUNS, *SMOKE)}
    for name in only:
        if name not in known:
            raise ValueError(f"--only={name}: expected one of {', '.join(known)}")
    names = set(only or [run.name for run in RUNS])
    names |= {run.name for run in SMOKE} if is_smoke else set()
    names |= {run.differs[0] for run in known.values() if run.differs and run.name in names}
    return [run for name, run in known.items() if name in names]


def judge(
    run: Run, trees: tuple[Tree, Tree], keep: pathlib.Path | None, bases: dict[str, Evidence]
) -> dict[str, Any]:
    """Trains a run in both trees and compares; one line of the table.

    Args:
        run: the run.
        trees: BASE's and the working tree.
        keep: folder of the run directories, or None for none.
        bases: what BASE's earlier runs left; this one's is added.
    """
    line: dict[str, Any] = {"run": run.name, "rows": 0, "keys": 0, "seconds": [], "is_ok": False}
    found = []
    for tree in trees:
        try:
            evidence, is_new = result_of(tree, run, keep)
        except RunFailedError as error:
            return line | {"verdict": f"FAILED in the {tree.label}: {error}"}
        line["seconds"].append(evidence.seconds if is_new else None)
        found.append(evidence)
        if len(found) == 1:
            bases[run.name] = evidence
            if run.differs and run.differs[0] not in bases:
                return line | {"verdict": f"NO WITNESS: {run.differs[0]} failed"}
            reasons = unmet(run, evidence, bases)
            if reasons:
                return line | {"verdict": f"NO WITNESS: {'; '.join(reasons)}"}
    base, tree = (values_of(evidence) for evidence in found)
    result = compare(base, tree)
    return line | {
        "rows": len(found[0].rows),
        "keys": result.count,
        "is_ok": result.is_equal,
        "verdict": result.text(),
        "differences": [list(difference) for difference in result.differences[:100]],
        "missing": [" ".join(key) for key in result.missing],
        "new": [" ".join(key) for key in result.new],
    }


def table_line(line: Mapping[str, Any]) -> str:
    """Name, rows, values, seconds in each tree (a dash: known already), verdict."""
    seconds = ["-" if s is None else f"{s:.0f}" for s in line["seconds"]]
    cells = f"{line['run']:<17}{line['rows']:>5}{line['keys']:>7}"
    return f"{cells}{'/'.join(seconds):>9}  {line['verdict']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the drill; 0 if every run is equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="HEAD", help="commit to compare with")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this run")
    parser.add_argument("--smoke", action="store_true", help="also cpu_smoke.py, seeds 0 and 1")
    parser.add_argument("--keep", type=pathlib.Path, help="keep the run directories here")
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".witness", help="of results")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    args = parser.parse_args(argv)
    show = (lambda *words: None) if args.json else (lambda *words: print(*words, flush=True))
    try:
        runs, trees = choose(args.only, args.smoke), open_trees(args.cache, args.base)
    except ValueError as error:
        print(f"witness: error: {error}", file=sys.stderr)
        return 2
    show(f"{'run':<17}{'rows':>5}{'values':>7}{'s':>9}  {trees[0].label} against the working tree")
    bases: dict[str, Evidence] = {}
    lines = []
    for run in runs:
        lines.append(judge(run, trees, args.keep, bases))
        show(table_line(lines[-1]))
    is_ok = all(line["is_ok"] for line in lines)
    bad = [line["run"] for line in lines if not line["is_ok"]]
    show("no number changed" if is_ok else f"{len(bad)} of {len(lines)} runs: {', '.join(bad)}")
    if args.json:
        print(json.dumps({"base": trees[0].home.name, "is_equal": is_ok, "runs": lines}))
    return int(not is_ok)


if __name__ == "__main__":
    sys.exit(main())
