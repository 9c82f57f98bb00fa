"""Two evaluations on the same images: values, paired differences, and files for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from speciarl_jax.report.load import load_run
from speciarl_jax.report.tables import format_estimate, format_value, metric_rows
from speciarl_jax.scoring.bootstrap import METRICS
from speciarl_jax.scoring.metrics import by_dataset, metrics_json, paired_differences
from speciarl_jax.scoring.predictions import Prediction
from speciarl_jax.scoring.results import (
    Difference,
    Estimate,
    Evaluation,
    MainMetric,
    ScoringSettings,
)
from speciarl_jax.scoring.seeds import mean_over_seeds

MAIN: tuple[MainMetric, ...] = ("specificity", "correctness", "hm")


def load_evaluation(path: str | Path, stage: str = "") -> tuple[str, list[Prediction], Evaluation]:
    """The rows that speak for a directory.

    Args:
        path: a run directory, or one evaluation of it (``RUN/eval/base``).
        stage: evaluation of the run; empty takes ``trained``, else the last one.

    Returns:
        Name, rows, content of its ``metrics.json``.

    Raises:
        ValueError: no such directory or evaluation.
    """
    path = Path(path)
    run = load_run(path)
    found = run.stage(stage) if stage else run.final
    if found is None:
        known = ", ".join(s.name for s in run.stages) or "none"
        raise ValueError(f"{path}: no evaluation {stage or 'of any name'!r} (found: {known})")
    name = run.name if found.name == "eval" else f"{run.name}/{found.name}"
    if found.name == "eval" and path.resolve().parent.name == "eval":
        name = f"{path.resolve().parents[1].name}/{run.name}"
    return name, found.predictions, found.metrics


def in_domain_of(*evaluations: Evaluation) -> list[str]:
    """Names of the data sets that any of them averages as ``in_domain``."""
    names = {n for e in evaluations for n in e.get("settings", {}).get("in_domain", [])}
    return sorted(n for n in names if isinstance(n, str))


def scoring_of(*evaluations: Evaluation) -> tuple[str, int]:
    """(rule for format failures, bootstrap samples) that evaluations were scored with.

    A comparison that takes them prints the intervals that stand in ``metrics.json``. The larger
    number of samples, where they differ.

    Raises:
        ValueError: they were scored with different rules.
    """
    settings = [e.get("settings", {}) for e in evaluations]
    rules = sorted({str(s.get("format_failures", "wrong")) for s in settings})
    if len(rules) > 1:
        raise ValueError(
            f"the runs were scored with format_failures {' and '.join(rules)}; choose one for both "
            "with --format_failures"
        )
    return rules[0], max(s.get("bootstrap_samples", 2000) for s in settings)


class Comparison(TypedDict):
    """What `compare` returns."""

    a: Evaluation
    b: Evaluation
    differences: dict[str, Difference]
    left_out: list[str]


def compare(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    in_domain: Collection[str] = (),
    format_failures: str = "wrong",
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Evaluation of both and paired differences (b minus a), per data set and average.

    Only data sets both have are compared; the others are named in ``left_out``.

    Args:
        a: rows of the first evaluation.
        b: rows of the second.
        in_domain: names averaged as ``in_domain``.
        format_failures: one of `bootstrap.FORMAT_RULES`.
        bootstrap_samples: resamples behind each interval.
        seed: of the resampling.

    Returns:
        ``{"a": metrics, "b": metrics, "differences": {name: ...}, "left_out": [...]}``; names are
        data sets and ``mean <average>``.

    Raises:
        ValueError: no common data set or image, or an unknown rule.
    """
    by_a, by_b = by_dataset(a), by_dataset(b)
    common = [n for n in by_a if n in by_b]
    if not common:
        raise ValueError(
            f"no data set in common: {', '.join(sorted(by_a))} against {', '.join(sorted(by_b))}"
        )
    settings: ScoringSettings = {
        "format_failures": format_failures,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
    }
    metrics_a, metrics_b = (
        metrics_json([p for n in common for p in rows[n]], in_domain, **settings)
        for rows in (by_a, by_b)
    )
    differences = {}
    for name, scores, is_average in metric_rows(metrics_a):
        members = scores["datasets"] if is_average else [name]
        differences[name] = paired_differences(
            [p for m in members for p in by_a[m]], [p for m in members for p in by_b[m]], **settings
        )
    left_out = sorted((set(by_a) | set(by_b)) - set(common))
    return {"a": metrics_a, "b": metrics_b, "differences": differences, "left_out": left_out}


def over_seeds(evaluations: Sequence[Evaluation]) -> dict[str, dict[MainMetric, Estimate]]:
    """Means with t intervals over runs that differ in their seed, see `mean_over_seeds`.

    Args:
        evaluations: content of each run's ``metrics.json``.

    Returns:
        By data set or ``mean <average>``, those that every run has, then by metric.
    """
    tables = [{name: scores for name, scores, _ in metric_rows(e)} for e in evaluations]
    return {
        name: {m: mean_over_seeds([table[name][m]["value"] for table in tables]) for m in MAIN}
        for name in tables[0]
        if all(name in table for table in tables)
    }


def headline_csv(evaluations: Mapping[str, Evaluation]) -> str:
    """One line per evaluation and data set or average; empty cells are undefined.

    Args:
        evaluations: content of ``metrics.json`` by name.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    sides = ("value", "low", "high")
    suffix = {"value": "", "low": "_low", "high": "_high"}
    header = [m + suffix[s] for m in METRICS for s in sides]
    writer.writerow(["evaluation", "data_set", "n", *header])
    for evaluation, metrics in evaluations.items():
        for name, scores, _ in metric_rows(metrics):
            cells = [scores[m][s] for m in METRICS for s in sides]
            numbers = ["" if v is None else f"{v:.6f}" for v in cells]
            writer.writerow([_no_formula(evaluation), _no_formula(name), scores["n"], *numbers])
    return out.getvalue()


def _no_formula(text: str) -> str:
    """A spreadsheet would run a cell that begins like a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def headline_latex(evaluations: Mapping[str, Evaluation]) -> str:
    """A ``tabular`` (booktabs) of specificity, correctness and HM with intervals.

    Args:
        evaluations: content of ``metrics.json`` by name.
    """
    lines = [
        r"\begin{tabular}{llccc}",
        r"\toprule",
        r"Evaluation & Data set & Specificity & Correctness & HM \\",
    ]
    for evaluation, metrics in evaluations.items():
        lines.append(r"\midrule")
        for i, (name, scores, is_average) in enumerate(metric_rows(metrics)):
            cells = [_latex_estimate(scores[m]) for m in MAIN]
            shown = rf"\textit{{{_latex(name)}}}" if is_average else _latex(name)
            first = _latex(evaluation) if i == 0 else ""
            lines.append(" & ".join([first, shown, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_estimate(estimate: Mapping[str, float | None]) -> str:
    value = format_value(estimate["value"]).replace("—", "--")
    if estimate["low"] is None:
        return value
    interval = format_estimate(estimate).split(" ", 1)[1]
    return rf"{value} {{\scriptsize {interval}}}"
