"""Drill: our trainer against one written on torch, the same recorded rollouts, update by update.

    python -m tests.drills.trajectory [--algorithms grpo gspo] [--steps 20] [--updates 2 4] [--json]

Each algorithm trains an adapter on a random policy from the same start for 20 steps, with 2 and
with 4 updates a step, on both sides; see `tests.support.trajectory` for what is compared and how
close it has to be. Prints a table, or with --json one object; exit code 1 if an adapter is beyond
the tolerance after any update, or if a rule acted on fewer tokens than it has to, since agreement
on what never happens proves nothing.
"""

import argparse
import dataclasses
import json
import sys
import time

import torch
import transformers

from tests.support.trajectory import (
    ALGORITHMS,
    TOLERANCE,
    Gap,
    run_trajectory,
    shortcomings,
    total_bite,
    trajectory_config,
)

HEADER = (
    f"{'step':>4} {'update':>6} {'adapter':>8} {'tensor':>8} {'element':>8} {'loss':>8} "
    f"{'norm':>8} {'clip':>6} {'dual':>6} {'capped':>6} {'kl':>6}"
)


def line(gap: Gap) -> str:
    """One update of the table."""
    bite = gap.bite.share()
    return (
        f"{gap.step:>4} {gap.update:>6} {gap.adapter:>8.1e} {gap.tensor:>8.1e} "
        f"{gap.element:>8.1e} {gap.loss:>8.1e} {gap.norm:>8.1e} {bite['clip']:>6.3f} "
        f"{bite['dual']:>6.3f} {bite['capped']:>6.3f} {bite['kl']:>6.3f}"
    )


def record(gap: Gap) -> dict[str, object]:
    """One update of the JSON object."""
    return {**dataclasses.asdict(gap), "bite": gap.bite.share()}


def drill(name: str, num_steps: int, updates: int, is_json: bool) -> dict[str, object]:
    """One trajectory and what it falls short of."""
    started, out = time.monotonic(), sys.stderr if is_json else sys.stdout
    print(f"\n{name}, {num_steps} steps x {updates} updates\n{HEADER}", file=out)
    gaps = []
    for gap in run_trajectory(trajectory_config(name, num_steps, updates)):
        gaps.append(gap)
        print(line(gap), file=out, flush=True)
    shares = total_bite(gaps).share()
    worst = {key: max(getattr(gap, key) for gap in gaps) for key in TOLERANCE[updates]}
    short = shortcomings(gaps)
    print("largest:", ", ".join(f"{key} {value:.1e}" for key, value in worst.items()), file=out)
    print("shares: ", ", ".join(f"{key} {value:.4f}" for key, value in shares.items()), file=out)
    print("\n".join([f"FAIL: {what}" for what in short] or ["ok"]), file=out, flush=True)
    return {
        "algorithm": name,
        "steps": num_steps,
        "updates_per_step": updates,
        "seconds": round(time.monotonic() - started, 1),
        "largest": worst,
        "shares": shares,
        "shortcomings": short,
        "updates": [record(gap) for gap in gaps],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--updates", nargs="+", type=int, choices=[*TOLERANCE], default=[*TOLERANCE], help="a step"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small are slower on several
    reports = [
        drill(name, args.steps, updates, args.json)
        for name in args.algorithms
        for updates in args.updates
    ]
    if args.json:
        print(json.dumps(reports))
    return int(any(report["shortcomings"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
