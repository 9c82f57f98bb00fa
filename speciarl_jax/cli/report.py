"""`speciarl report` and `speciarl compare`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from speciarl_jax.cli.flags import Verbs
from speciarl_jax.files import write_whole
from speciarl_jax.monitor.tables import make_console
from speciarl_jax.report.compare import (
    compare,
    headline_csv,
    headline_latex,
    load_evaluation,
    over_seeds,
    scoring_rule,
)
from speciarl_jax.report.load import Run, load_runs
from speciarl_jax.report.tables import comparison_table, seeds_table
from speciarl_jax.scoring.bootstrap import FORMAT_RULES
from speciarl_jax.scoring.results import Evaluation


def register(subparsers: Verbs) -> None:
    """Adds the verbs `report` and `compare`."""
    report = subparsers.add_parser("report", help="one static HTML page from run directories")
    report.add_argument("runs", nargs="+", metavar="DIR", help="run directories")
    report.add_argument("--out", default="report.html", help="page to write")
    report.add_argument("--title", default="", help="heading; the first run's name if none")
    report.add_argument("--taxonomy", default="", help="tree of names for the confusion by level")
    report.add_argument("--max_rollouts", type=int, default=20_000, help="rows in the gallery")
    report.add_argument("--max_mb", type=float, default=25.0, help="size of the page at most, MB")
    _add_exports(report)
    report.set_defaults(handler=run_report)

    pair = subparsers.add_parser(
        "compare", help="two runs in the terminal, second minus first; or the seeds of one recipe"
    )
    pair.add_argument("first", metavar="DIR", help="run, or one evaluation of it: RUN/eval/base")
    pair.add_argument("second", metavar="DIR", help="likewise")
    pair.add_argument("others", nargs="*", metavar="DIR", help="more seeds, with --seeds")
    pair.add_argument(
        "--seeds", action="store_true", help="runs of one recipe: means over seeds, t intervals"
    )
    pair.add_argument("--stage", default="", help="evaluation of both runs; trained if none")
    pair.add_argument(
        "--format_failures",
        default="",
        choices=FORMAT_RULES,
        help="as the runs were scored if none",
    )
    pair.add_argument("--bootstrap_samples", type=int, default=0, help="as the runs' if none")
    pair.add_argument("--seed", type=int, default=0, help="of the resampling")
    _add_exports(pair)
    pair.set_defaults(handler=run_compare)


def _add_exports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", default="", help="also write the headline table as CSV here")
    parser.add_argument("--latex", default="", help="also write it as a LaTeX tabular here")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise ValueError(f"{path}: cannot write: {error.strerror}") from None


def _export(args: argparse.Namespace, evaluations: dict[str, Evaluation]) -> None:
    if args.csv:
        _write(Path(args.csv), headline_csv(evaluations))
    if args.latex:
        _write(Path(args.latex), headline_latex(evaluations))


def run_report(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is.

    Raises:
        ValueError: a directory or file that cannot be read, a page that cannot be written.
    """
    # matplotlib takes its time
    from speciarl_jax.report.page import ReportOptions, build_page

    runs = load_runs(args.runs)
    options = ReportOptions(
        title=args.title or runs[0].name,
        taxonomy=_taxonomy(args.taxonomy, runs[0]),
        max_rollouts=args.max_rollouts,
        max_mb=args.max_mb,
    )
    page = build_page(runs, options)
    out = Path(args.out)
    _write(out, page)
    _export(args, {f"{r.name} {s.name}": s.metrics for r in runs for s in r.stages})
    size_mb = out.stat().st_size / 1e6
    if args.json:
        print(json.dumps({"out": str(out), "size_mb": size_mb, "runs": [r.name for r in runs]}))
    else:
        print(f"{out}  {size_mb:.1f} MB, open it in a browser")
    return 0


def _taxonomy(path: str, run: Run) -> Path | None:
    """The tree given, else the one the run was judged by, else the field guide's."""
    from speciarl_jax.config.judge import FIELD_GUIDE_TAXONOMY

    if path:
        if not Path(path).exists():
            raise ValueError(f"--taxonomy={path}: no such file")
        return Path(path)
    judge = run.config.get("judge")
    named = judge.get("taxonomy") if isinstance(judge, dict) else None
    if isinstance(named, str) and named:
        return Path(named)
    is_field_guide = any(
        name.startswith("field_guide") for s in run.stages for name in s.metrics["datasets"]
    )
    return FIELD_GUIDE_TAXONOMY if is_field_guide else None


def run_compare(args: argparse.Namespace) -> int:
    """Prints values, differences and paired intervals; with ``--seeds`` means over all runs.

    Raises:
        ValueError: a directory without an evaluation, no common image, more than two runs without
            ``--seeds``, or an option of the other kind of table with it.
    """
    if args.seeds:
        return _compare_seeds(args)
    if args.others:
        raise ValueError(
            f"{len(args.others) + 2} directories: compare takes two; add --seeds for means over "
            "runs that differ in their seed"
        )
    name_a, a = load_evaluation(args.first, args.stage)
    name_b, b = load_evaluation(args.second, args.stage)
    compared = compare(
        a.predictions,
        b.predictions,
        sorted({*a.in_domain, *b.in_domain}),
        scoring_rule([a, b], args.format_failures, args.bootstrap_samples, args.seed),
    )
    _export(args, {name_a: compared["a"], name_b: compared["b"]})
    if args.json:
        print(json.dumps({"names": [name_a, name_b], **compared}, allow_nan=False))
        return 0
    console = make_console()
    title = f"{name_b} against {name_a}"
    console.print(comparison_table(compared, title, (name_a, name_b)))
    if compared["left_out"]:
        print(f"not compared, only one has them: {', '.join(compared['left_out'])}",
              file=sys.stderr)  # fmt: skip
    return 0


def _compare_seeds(args: argparse.Namespace) -> int:
    """Means over the runs; all of them were scored by one rule."""
    if args.format_failures or args.bootstrap_samples or args.seed:
        raise ValueError(
            "--seeds takes the values of each metrics.json and resamples nothing: leave out "
            "--format_failures, --bootstrap_samples and --seed"
        )
    loaded = [load_evaluation(path, args.stage) for path in (args.first, args.second, *args.others)]
    scoring_rule([stage for _, stage in loaded])
    means = over_seeds([stage.metrics for _, stage in loaded])
    _export(args, {name: stage.metrics for name, stage in loaded})
    if args.json:
        print(json.dumps({"names": [name for name, _ in loaded], "means": means}, allow_nan=False))
    else:
        make_console().print(seeds_table(means, f"mean over {len(loaded)} seeds"))
    return 0
