"""`speciarl judge serve | check | label | eval | cache | log`: parse, call, print."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from speciarl_jax.cli.flags import Verbs
from speciarl_jax.config.judge import (
    FIELD_GUIDE_TAXONOMY,
    REDIS_SCHEMES,
    JudgeConfig,
    apply_overrides,
)
from speciarl_jax.errors import JudgeError
from speciarl_jax.files import whole_file
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.pairs_file import outcome_json, read_pairs
from speciarl_jax.types import Category, FailureKind, Verdict


def register(subparsers: Verbs) -> None:
    """Adds the verb `judge` and its own verbs; each sets `handler`, a function args -> exit code.

    Handlers raise ValueError for bad settings and JudgeError for everything that went wrong at
    the judge; the command line turns these into one line and exit codes 2 and 1.
    """
    judge = subparsers.add_parser("judge", help="serve, check, ask and measure the judge")
    verbs = judge.add_subparsers(dest="judge_verb", required=True)
    _add_serve(verbs)
    check = verbs.add_parser("check", help="ask an endpoint a question with a known answer")
    _add_endpoint(check)
    check.add_argument("--deadline_s", type=float, default=30.0, help="seconds to wait for it")
    check.set_defaults(handler=run_check)
    label = verbs.add_parser("label", help="label pairs from a file")
    label.add_argument("pairs", help='JSON lines of {"ground_truth", "answer"}')
    label.add_argument("--out", required=True, help="JSON lines with category or failure added")
    _add_endpoint(label)
    label.set_defaults(handler=run_label)
    quality = verbs.add_parser("eval", help="measure a judge against labelled pairs")
    labelled = "JSON lines with a category; the shipped set if none"
    quality.add_argument("labelled", nargs="?", default="", help=labelled)
    quality.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    quality.add_argument("--out", default="", help="also write each pair with both labels here")
    _add_endpoint(quality)
    quality.set_defaults(handler=run_eval)
    _add_files(verbs)


def _add_serve(verbs: Verbs) -> None:
    """`serve`: the offline judge for other machines or for tests."""
    serve = verbs.add_parser("serve", help="serve the offline judge, OpenAI-compatible")
    serve.add_argument("--taxonomy", default=str(FIELD_GUIDE_TAXONOMY), help="name tree")
    serve.add_argument("--port", type=int, default=8000, help="TCP port; 0 takes a free one")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--faults", default="", help="faults on purpose: 429=0.1,reset=0.05,...")
    serve.set_defaults(handler=run_serve)


def _add_files(verbs: Verbs) -> None:
    """`cache` and `log`: what is on disk."""
    cache = verbs.add_parser("cache", help="look after a verdict cache")
    cache.add_argument("action", choices=("stats", "export", "import", "purge"))
    cache.add_argument("path", help="cache file, or redis://HOST:PORT/DB")
    cache.add_argument("--file", default="", help="JSON lines to export to or import from")
    cache.add_argument("--judge", default="", help="purge: only labels of this judge")
    cache.add_argument("--older_than_days", type=float, default=0.0, help="purge: only older ones")
    cache.set_defaults(handler=run_cache)
    log = verbs.add_parser("log", help="query a run's verdict log")
    log.add_argument("path", help="run directory, or its log file")
    log.add_argument("--category", default="", help="only this label, or failed:timeout etc.")
    log.add_argument("--text", default="", help="only pairs with this ground truth or answer")
    log.add_argument("--limit", type=int, default=50, help="lines at most")
    log.set_defaults(handler=run_log)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Who is asked: the options that name a judge."""
    parser.add_argument("--endpoint", action="append", default=[], help="base URL; may be repeated")
    parser.add_argument("--model", default="", help="model name; needed with --endpoint")
    parser.add_argument("--taxonomy", default="", help="without --endpoint: tree to judge by")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any judge setting"
    )


def config_from_args(args: argparse.Namespace) -> JudgeConfig:
    """The settings that the options describe.

    Raises:
        ValueError: an option contradicts another, or names no setting.
    """
    config = JudgeConfig(taxonomy=args.taxonomy)
    if args.endpoint:
        config = JudgeConfig(kind="endpoint", endpoints=tuple(args.endpoint), model=args.model)
        if not args.model:
            raise ValueError(
                "--endpoint needs --model: a name that GET /v1/models of the endpoint gives"
            )
    return apply_overrides(config, args.set)


def run_serve(args: argparse.Namespace) -> int:
    """Serves until a signal arrives.

    Raises:
        ValueError: no such port.
    """
    from speciarl_jax.judge.offline import server

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port={args.port}: expected a port from 0 to 65535")
    options = ["--taxonomy", args.taxonomy, "--port", str(args.port), "--host", args.host]
    return server.main([*options, "--faults", args.faults])


def run_check(args: argparse.Namespace) -> int:
    """Asks the known question and says how it went."""
    from speciarl_jax.judge.runner import JudgeThread

    config = config_from_args(args)
    with JudgeThread(config) as judge:
        judge.check_health(args.deadline_s)
        print("judge answers: the known pair was labelled")
    if not config.endpoints:
        print(_describe(config))
    return 0


def _describe(config: JudgeConfig) -> str:
    """What the offline judge's tree can tell."""
    from speciarl_jax.judge.offline.taxonomy import TaxonomyJudge

    return f"{config.taxonomy_path}: {TaxonomyJudge.from_path(config.taxonomy_path).describe()}"


def run_label(args: argparse.Namespace) -> int:
    """Labels a file of pairs; exit code 1 if any pair stayed without a label.

    Labels go into a cache of the output's own as they come, unless the settings name one: whatever
    ends the call early, the same command goes on from there. The cache goes once all is labelled.

    Raises:
        ValueError: the output cannot be written there, told before anything is asked.
        JudgeError: the judge cannot be used; says how many labels are kept, and where.
    """
    from speciarl_jax.judge.runner import JudgeThread

    items = read_pairs(args.pairs)
    out = Path(args.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out={args.out}: no such folder; make it first")
    if out.is_dir():
        raise ValueError(f"--out={args.out}: is a folder; name a file in it")
    config = config_from_args(args)
    own = None
    if not config.cache_path and (out.is_file() or not out.exists()):  # /dev/stdout has no beside
        own = out.with_name(out.name + ".cache.sqlite")
        config.cache_path = str(own)
    pairs = [Pair(item["ground_truth"], item["answer"]) for item in items]
    is_complete = False
    try:
        with whole_file(out) as partial, partial.open("w", encoding="utf-8") as file:
            with JudgeThread(config) as judge:
                outcomes = judge.label(pairs)
            for item, outcome in zip(items, outcomes, strict=True):
                file.write(json.dumps({**item, **outcome_json(outcome)}) + "\n")
        failed = sum(not isinstance(outcome, Verdict) for outcome in outcomes)
        is_complete = not failed
    except JudgeError as error:
        kept = _count_labels(config.cache_path)
        remedy = "the same command asks for the rest only" if kept else "nothing was labelled"
        raise JudgeError(f"{error} ({kept} labels in {config.cache_path}: {remedy})") from error
    finally:
        if own is not None and own.exists() and (is_complete or not _count_labels(str(own))):
            own.unlink()
    print(f"{len(outcomes) - failed} of {len(outcomes)} pairs labelled -> {args.out}")
    return 1 if failed else 0


def _count_labels(place: str) -> int:
    """Labels in a cache; 0 if there is none, or none that can be read."""
    from speciarl_jax.judge.store.cache import open_cache

    is_file = not place.startswith(REDIS_SCHEMES)
    if not place or (is_file and not Path(place).is_file()):
        return 0
    with contextlib.suppress(JudgeError), contextlib.closing(open_cache(place)) as cache:
        return len(cache)
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Measures a judge against labelled pairs; exit code 1 if any pair stayed without a label."""
    from speciarl_jax.judge import quality

    config = config_from_args(args)
    if not config.endpoints and not config.taxonomy:
        _explain_offline(args.labelled)
    report = asyncio.run(quality.evaluate_file(config, args.labelled, args.out))
    print(json.dumps(report.to_json()) if args.json else report.to_text())
    if report.num_failed:
        count = f"{report.num_failed} of {report.num_pairs}"
        print(f"{count} pairs got no label; the rest was measured", file=sys.stderr)
    return 1 if report.num_failed else 0


def _explain_offline(labelled: str) -> None:
    """Says what is measured if nobody was named.

    Raises:
        ValueError: the shipped pairs, of which the offline judge knows next to none.
    """
    known = "the offline judge, which knows the names of the field guide only"
    remedy = "give --endpoint and --model for a model, or --taxonomy for another tree of names"
    if not labelled:
        raise ValueError(
            f"without --endpoint the shipped pairs would be asked of {known}: {remedy}"
        )
    print(f"asking {known}; {remedy}", file=sys.stderr)


def run_cache(args: argparse.Namespace) -> int:
    """Statistics, export, import, purge."""
    from speciarl_jax.judge.store.cache import open_cache

    if args.action in ("export", "import") and not args.file:
        raise ValueError(f"judge cache {args.action} needs --file")
    is_file = not args.path.startswith(REDIS_SCHEMES)
    if is_file and args.action != "import" and not Path(args.path).exists():
        raise JudgeError(f"judge cache {args.path}: no such file")
    if is_file and Path(args.path).is_file() and not Path(args.path).stat().st_size:
        raise JudgeError(f"judge cache {args.path}: an empty file; delete it, or name the cache")
    with contextlib.closing(open_cache(args.path)) as cache:
        if args.action == "stats":
            print(json.dumps(cache.stats(), indent=1))
        elif args.action == "export":
            print(f"{cache.export(args.file)} labels written to {args.file}")
        elif args.action == "import":
            print(f"{cache.import_(args.file)} new labels read from {args.file}")
        else:
            print(f"{cache.purge(args.judge, args.older_than_days * 86400)} labels deleted")
    return 0


def run_log(args: argparse.Namespace) -> int:
    """Prints lines of a verdict log, most frequent first, as JSON."""
    from speciarl_jax.judge.store.verdict_log import VerdictLog

    paths = _log_files(Path(args.path))
    known = [c.label for c in Category] + [f"failed:{kind.value}" for kind in FailureKind]
    if args.category and args.category not in known:
        raise ValueError(f"--category={args.category}: expected one of {', '.join(known)}")
    rows = []
    for path in paths:
        with contextlib.closing(VerdictLog(str(path))) as log:
            rows += log.rows(args.category, args.text, args.limit)
    rows.sort(key=lambda row: -row.count)
    for row in rows[: args.limit] if args.limit >= 0 else rows:
        print(json.dumps(dataclasses.asdict(row)))
    return 0


def _log_files(path: Path) -> list[Path]:
    """The log itself, or those of a run directory, one for each process.

    Raises:
        JudgeError: there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(path.glob("verdicts*.sqlite")) if path.is_dir() else []
    if not found:
        what = "holds no verdicts*.sqlite" if path.is_dir() else "no such file"
        raise JudgeError(f"verdict log {path}: {what}; name a run directory or its log file")
    return found
