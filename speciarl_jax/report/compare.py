"""Two evaluations on the same images: values, paired differences, and files for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from speciarl_jax.report.load import Stage, load_run
from speciarl_jax.report.tables import MAIN, format_estimate, metric_rows
from speciarl_jax.scoring.bootstrap import DEFAULT_RULE, METRICS, ScoringRule
from speciarl_jax.scoring.metrics import by_dataset, metrics_json, paired_differences
from speciarl_jax.scoring.predictions import Prediction
from speciarl_jax.scoring.results import Comparison, Estimate, Evaluation, MainMetric
from speciarl_jax.scoring.seeds import mean_over_seeds


def load_evaluation(path: str | Path, stage: str = "") -> tuple[str, Stage]:
    """The evaluation that speaks for a directory.

    Args:
        path: a run directory, or one evaluation of it (``RUN/eval/base``).
        stage: evaluation of the run; empty takes ``trained``, else the last one.

    Returns:
        (its name with that of its run, the evaluation).

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
    return name, found


def scoring_rule(
    stages: Sequence[Stage], format_failures: str = "", bootstrap_samples: int = 0, seed: int = 0
) -> ScoringRule:
    """The rule that evaluations were scored with, but for what is asked here.

    A comparison that takes all of it prints the intervals that stand in ``metrics.json``.

    Args:
        stages: what is compared.
        format_failures: instead of theirs; "" takes theirs.
        bootstrap_samples: likewise; 0 takes theirs, the larger number where they differ.
        seed: of the resampling.

    Raises:
        ValueError: they were scored with different rules, and none is given here.
    """
    settings = [stage.metrics.get("settings", {}) for stage in stages]
    default = DEFAULT_RULE
    rules = sorted({str(s.get("format_failures", default.format_failures)) for s in settings})
    if len(rules) > 1 and not format_failures:
        raise ValueError(
            f"the runs were scored with format_failures {' and '.join(rules)}; choose one for both "
            "with --format_failures"
        )
    samples = [int(s.get("bootstrap_samples", default.bootstrap_samples)) for s in settings]
    return ScoringRule(format_failures or rules[0], bootstrap_samples or max(samples), seed)


def compare(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    in_domain: Collection[str] = (),
    rule: ScoringRule = DEFAULT_RULE,
) -> Comparison:
    """Evaluation of both and paired differences (b minus a), per data set and average.

    Only data sets that both have are compared; `in_domain` names those averaged as such.

    Raises:
        ValueError: no common data set or image.
    """
    by_a, by_b = by_dataset(a), by_dataset(b)
    common = [n for n in by_a if n in by_b]
    if not common:
        raise ValueError(
            f"no data set in common: {', '.join(sorted(by_a))} against {', '.join(sorted(by_b))}"
        )
    metrics_a, metrics_b = (
        metrics_json([p for n in common for p in rows[n]], in_domain, rule) for rows in (by_a, by_b)
    )
    differences = {}
    for name, scores, is_average in metric_rows(metrics_a):
        members = scores["datasets"] if is_average else [name]
        differences[name] = paired_differences(
            [p for m in members for p in by_a[m]], [p for m in members for p in by_b[m]], rule
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
    """One line per evaluation and data set or average; empty cells are undefined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [m + suffix for m in METRICS for suffix in ("", "_low", "_high")]
    writer.writerow(["evaluation", "data_set", "n", *header])
    for evaluation, metrics in evaluations.items():
        for name, scores, _ in metric_rows(metrics):
            cells = [scores[m][s] for m in METRICS for s in ("value", "low", "high")]
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
    """A ``tabular`` (booktabs) of specificity, correctness and HM with intervals."""
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
    value, _, interval = format_estimate(estimate).replace("—", "--").partition(" ")
    return rf"{value} {{\scriptsize {interval}}}" if interval else value
