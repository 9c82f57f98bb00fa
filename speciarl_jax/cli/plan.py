"""`speciarl plan`: what a recipe needs on a machine that is not there."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from speciarl_jax.cli.flags import Verbs, add_recipe
from speciarl_jax.config.recipes import load_recipe


def register(verbs: Verbs) -> None:
    """Adds the verb ``plan``."""
    plan = verbs.add_parser("plan", help="compile every program of a step for absent devices")
    add_recipe(plan)
    plan.add_argument("--topology", required=True, help="v5e:8x8, v5p:2x2x4, gpu:h200x8, ...")
    plan.add_argument("--all_buckets", action="store_true", help="the smaller shapes too")
    plan.add_argument("--search", action="store_true", help="find the largest settings that fit")
    plan.add_argument("--price", type=float, default=0.0, help="of one chip, money per hour")
    plan.add_argument("--limit_s", type=float, default=3600.0, help="give up after, seconds")
    plan.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    plan.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plans in a process of its own and prints the result.

    Raises:
        ValueError: bad recipe or topology, or the one does not fit the other.
    """
    from speciarl_jax.plan.chips import libtpu_misfit, worker_environment
    from speciarl_jax.plan.worker import Request

    config, _ = load_recipe(args.config, args.overrides)
    config.validate()
    misfit = libtpu_misfit(args.topology)
    if misfit:
        print(f"plan: warning: {misfit}", file=sys.stderr, flush=True)
    request = Request(config, args.topology, args.all_buckets, args.search, args.price)
    with subprocess.Popen(
        [sys.executable, "-m", "speciarl_jax.plan.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=worker_environment(args.topology),
    ) as process:
        is_late, output, noise = _talk(process, pickle.dumps(request), args.limit_s)
    if process.returncode in (0, 2) and output:
        return _show(output, args.json, misfit)
    print("".join(noise), end="", file=sys.stderr)
    if is_late:
        reason = f"no result within --limit_s={args.limit_s:g}; raise it"
    elif misfit:
        reason = f"the compiler crashed (exit code {process.returncode}): {misfit}"
    else:
        reason = (
            f"the compiler crashed (exit code {process.returncode}) in the program after the last "
            "one named above; try another mesh or smaller shapes"
        )
    print(f"speciarl: error: plan: {reason}", file=sys.stderr)
    return 1


def _talk(
    process: subprocess.Popen[bytes], request: bytes, limit_s: float
) -> tuple[bool, bytes, Sequence[str]]:
    """(whether the limit ended it, standard output, last lines of standard error)."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    noise: collections.deque[str] = collections.deque(maxlen=20)
    listener = threading.Thread(target=_listen, args=(process.stderr, noise), daemon=True)
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        process.kill()

    limit = threading.Timer(limit_s, stop)
    listener.start()
    limit.start()
    try:
        process.stdin.write(request)
        process.stdin.close()
        output = process.stdout.read()
        listener.join()
        process.wait()
    finally:
        limit.cancel()
        process.kill()
    return is_late.is_set(), output, noise


def _listen(stream: IO[bytes], noise: collections.deque[str]) -> None:
    for raw in stream:
        line = raw.decode(errors="replace")
        if line.startswith("plan: "):
            print(line, end="", file=sys.stderr, flush=True)
        else:
            noise.append(line)


def _show(output: bytes, is_json: bool, misfit: str) -> int:
    from speciarl_jax.plan.table import plan_text

    plan = json.loads(output)
    if "error" in plan:
        raise ValueError("; ".join(filter(None, (plan["error"], misfit))))
    if is_json:
        print(json.dumps(plan))
        return 0
    if plan["flags"]:
        print(f"found: {plan['flags']}\n")
    print(plan_text(plan))
    return 0
