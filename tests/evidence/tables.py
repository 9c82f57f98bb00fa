"""`python -m tests.evidence.tables`: docs/evidence.json into docs/results.md and its figure.

Replaces what stands between ``<!-- evidence: NAME -->`` and ``<!-- end -->`` in docs/results.md,
and draws docs/images/evidence_curves.png. Nothing there is written by hand.
"""

from __future__ import annotations

import collections
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence

from speciarl_jax.files import write_whole
from speciarl_jax.report.tables import format_estimate, format_value
from speciarl_jax.scoring.seeds import mean_over_seeds
from tests.evidence.rows import DYNAMIC, ROWS, Row
from tests.evidence.run import METRICS, RESULTS, ROOT, key, read_results

PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "images" / "evidence_curves.png"
_BLOCK = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LEARNING = "eval_sampled/out_of_domain/hm"
# In the figure and by kind of picture.
SHOWN = (DYNAMIC, "row=binary", "row=scale1", "row=speciarl,n=15", "row=speciarl,n=15,support=0.3")


def runs_of(results: dict, row: Row) -> list[dict]:
    """Finished runs of a row, in order of seeds."""
    names = (key(row, seed) for seed in range(row.num_seeds))
    return [results[name] for name in names if name in results]


def final(run: dict, suffix: str = "") -> dict | None:
    """The scores that speak for a run; None where it has none of that kind."""
    stages = (f"trained{suffix}", f"base{suffix}", *(() if suffix else ("best_of",)))
    return next((run["scores"][s] for s in stages if s in run["scores"]), None)


def while_learning(run: dict) -> float | None:
    """Mean over the validations after the first of HM out of domain at temperature 1."""
    curve = [value for step, value in run["curves"].get(_LEARNING, []) if step]
    return statistics.fmean(curve) if curve else None


def _mean(stages: Sequence[dict | None], average: str, metric: str) -> str:
    values = [s[average][metric][0] if s and s.get(average) else None for s in stages]
    return format_estimate(mean_over_seeds(values)) if any(stages) else ""


def main_table(results: dict) -> str:
    """One line a row: means over seeds with t intervals, beside the paper's."""
    lines = [
        "| row | seeds | specificity | correctness | HM | temperature 1: HM | while learning | "
        "wrong | in domain: HM | the paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        runs = runs_of(results, row)
        if not runs:
            lines.append(f"| {row.title} | 0 of {row.num_seeds} | | | | | | | | {row.paper} |")
            continue
        greedy = [final(run) for run in runs]
        sampled = [final(run, "_sampled") for run in runs]
        cells = [_mean(greedy, "out_of_domain", m) for m in METRICS]
        cells.append(_mean(sampled, "out_of_domain", "hm"))
        learning = [while_learning(run) for run in runs]
        cells.append(format_estimate(mean_over_seeds(learning)) if any(learning) else "")
        wrong = [stage.get("wrong") if stage else None for stage in sampled]
        known = [value for value in wrong if value is not None]
        cells.append(f"{statistics.fmean(known):.3f}"[1:] if known else "")
        cells.append(_mean(greedy, "in_domain", "hm"))
        seeds = str(len(runs)) if len(runs) == row.num_seeds else f"{len(runs)} of {row.num_seeds}"
        lines.append(f"| {row.title} | {seeds} | {' | '.join(cells)} | {row.paper} |")
    return "\n".join(lines) + "\n"


def difference_table(results: dict) -> str:
    """Each trained row minus the dynamic reward on the same seeds: pictures are the same, too."""
    lines = [
        "| row minus dynamic, N=10 | seeds | specificity | correctness | HM | temperature 1: HM | "
        "while learning |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.argument == DYNAMIC:
            continue
        dynamic = Row("", DYNAMIC)
        pairs = [
            (results[key(row, s)], results[key(dynamic, s)])
            for s in range(row.num_seeds)
            if key(row, s) in results and key(dynamic, s) in results
        ]
        cells = [_difference(pairs, "", metric) for metric in METRICS]
        cells.append(_difference(pairs, "_sampled", "hm"))
        both = [(while_learning(run), while_learning(dynamic)) for run, dynamic in pairs]
        learning = [mine - its for mine, its in both if mine is not None and its is not None]
        estimate = mean_over_seeds(learning)
        cells.append(format_estimate(estimate, is_signed=True) if learning else "")
        if pairs and any(cells):
            lines.append(f"| {row.title} | {len(pairs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(pairs: Sequence[tuple[dict, dict]], suffix: str, metric: str) -> str:
    values = []
    for run, dynamic in pairs:
        both = final(run, suffix), final(dynamic, suffix)
        if any(stage is None or stage["out_of_domain"] is None for stage in both):
            return ""  # nothing is out of the domain of a row that is trained on all
        mine, its = (stage["out_of_domain"][metric][0] for stage in both)
        values.append(None if mine is None else mine - its)
    return format_estimate(mean_over_seeds(values), is_signed=True)


def kind_table(results: dict) -> str:
    """Samples that name a species, right or not, by how many species a picture leaves open."""
    lines = [
        "| row | seeds | 1 | 2 | 3 | 6 | 12 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [Row("the base", DYNAMIC, 5), *(r for r in ROWS if r.argument in SHOWN)]
    for row in rows:
        stage = "base_sampled" if row.title == "the base" else "trained_sampled"
        counts = [run["candidates"].get(stage) for run in runs_of(results, row)]
        if counts:
            cells = [_share(counts, str(kind)) for kind in (1, 2, 3, 6, 12)]
            lines.append(f"| {row.title} | {len(counts)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(counts: Sequence[dict], kind: str) -> str:
    """``wrong / specific`` of all answers to pictures of a kind."""
    total = sum((collections.Counter(c[kind]) for c in counts), collections.Counter())
    parts = (total["wrong"], total["specific"])
    return " / ".join(f"{part / total.total():.3f}".removeprefix("0") for part in parts)


def run_table(results: dict) -> str:
    """Every run: what it reached out of domain, and with which code."""
    lines = [
        "| run | specificity / correctness / HM | temperature 1 | commit | minutes |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        for seed in range(row.num_seeds):
            run = results.get(key(row, seed))
            if run is None:
                continue
            cells = [_three(final(run)), _three(final(run, "_sampled"))]
            lines.append(
                f"| `{key(row, seed)}` | {cells[0]} | {cells[1]} | {run['commit']} | "
                f"{run['minutes']} |"
            )
    return "\n".join(lines) + "\n"


def _three(stage: dict | None) -> str:
    if stage is None:
        return ""
    if stage["out_of_domain"] is None:  # trained on all
        return "—"
    return " / ".join(format_value(stage["out_of_domain"][m][0]) for m in METRICS)


TABLES: dict[str, Callable[[dict], str]] = {
    "main": main_table,
    "differences": difference_table,
    "kinds": kind_table,
    "runs": run_table,
}


def filled(page: str, results: dict) -> str:
    """The page with its tables made again."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](results)}\n{m[3]}", page)


def draw_curves(results: dict, path: pathlib.Path) -> None:
    """HM out of domain on the validation pictures against steps, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {row.argument: row for row in ROWS}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for argument in SHOWN:
        row = titles[argument]
        runs = runs_of(results, row)
        for ax, prefix in zip(axes, ("eval", "eval_sampled"), strict=True):
            curves = [dict(map(tuple, r["curves"][f"{prefix}/out_of_domain/hm"])) for r in runs]
            if curves:
                steps = sorted(set.intersection(*(set(c) for c in curves)))
                means = [statistics.fmean(c[step] for c in curves) for step in steps]
                label = f"{row.title.replace('*', '')} ({len(runs)})"
                ax.plot(steps, means, label=label)
    for ax, title in zip(axes, ("greedy", "samples at temperature 1"), strict=True):
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("HM out of domain, validation")
    axes[1].legend(fontsize=8, title="(seeds)")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Writes the page and its figure."""
    results = read_results()
    write_whole(PAGE, filled(PAGE.read_text(), results))
    draw_curves(results, FIGURE)
    print(f"{len(results)} runs of {RESULTS.name}: {PAGE}, {FIGURE}")


if __name__ == "__main__":
    main()
