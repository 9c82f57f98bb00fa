"""Drill: many requests against a judge that fails in every way; nothing may be lost or invented.

    python -m tests.drills.fault_server [--requests 20000] [--faults spread|each]

`spread`: 10 % of the requests fail, in equal shares of all kinds. `each`: 80 % in all. Several
kinds answer with a wrong label (see judge/offline/lies.py), so that one that is believed counts as
invented. Answers take 20 ms in the median (log-normal, sigma .5). Prints one JSON object;
exit code 1, and what was missed, if a label is lost or wrong, memory grows, or (`spread` only, for
in `each` a pair costs five requests and some of a time-out) labels come too slowly.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from speciarl_jax.config.judge import FIELD_GUIDE_TAXONOMY, JudgeConfig
from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.faults import FAULT_KINDS
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.offline.taxonomy import TaxonomyJudge
from speciarl_jax.types import Verdict

LEAST_UNCACHED, LEAST_CACHED = 200, 50_000  # labels per second
MOST_GROWTH_MB = 60.0  # of resident memory after the first fifth of the time


def make_pairs(count: int, seed: int) -> list[Pair]:
    """Distinct pairs of field guide names, so that the right label of each is known."""
    tree = json.loads(FIELD_GUIDE_TAXONOMY.read_text(encoding="utf-8"))
    names, species, stack = [], [], [tree]
    while stack:
        node = stack.pop()
        names += [node["name"], *node.get("synonyms", ())]
        species += [] if node.get("children") else [node["name"]]
        stack += node.get("children", ())
    product = [
        Pair(t.lower(), n.lower()) for t, n in itertools.product(species, dict.fromkeys(names))
    ]
    distinct = [pair for pair in dict.fromkeys(product) if pair.ground_truth != pair.answer]
    random.Random(seed).shuffle(distinct)
    if len(distinct) < count:
        raise SystemExit(f"only {len(distinct)} distinct pairs; ask for fewer than {count}")
    return distinct[:count]


def resident_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch_memory(samples: list[float], stop: threading.Event) -> None:
    """Samples the memory until told to stop."""
    while not stop.wait(0.25):
        samples.append(resident_mb())


def faults_text(form: str) -> str:
    """The fault plan of the local server."""
    # Seed 2 lets the first request through: a refused health check ends the drill, and rightly so.
    share = (0.1 if form == "spread" else 0.8) / len(FAULT_KINDS)
    shares = ",".join(f"{kind}={share:.6f}" for kind in FAULT_KINDS)
    return f"{shares},latency=0.02,latency_sigma=0.5,retry_after=0.5,seed=2"


async def ask(config: JudgeConfig, pairs: list[Pair]) -> dict[str, object]:
    """Labels all pairs uncached, then cached in one call; returns outcomes and figures."""
    samples: list[float] = []
    stop = threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(samples, stop))
    async with JudgeClient(config) as judge:
        await judge.check_health(30.0)
        watcher.start()
        started = time.perf_counter()
        outcomes = await judge.label(pairs)
        uncached_s = time.perf_counter() - started
        stop.set()
        watcher.join()
        started = time.perf_counter()
        again = await judge.label(pairs)
        cached_s = time.perf_counter() - started
        stats = judge.stats()
    async with JudgeClient(config) as judge:  # a new process's view: from the file only
        started = time.perf_counter()
        cold = await judge.label(pairs)
        cold_s = time.perf_counter() - started
    plain = [getattr(outcome, "category", None) for outcome in outcomes]
    for other in (again, cold):
        assert [getattr(outcome, "category", None) for outcome in other] == plain
    return {"outcomes": outcomes, "stats": stats, "uncached_s": uncached_s,
            "cached_s": cached_s, "cold_s": cold_s, "samples": samples}  # fmt: skip


def drill(num_requests: int, form: str, concurrency: int, timeout_s: float) -> dict[str, object]:
    """Runs the drill and returns its report."""
    pairs = make_pairs(num_requests, seed=0)
    truth = TaxonomyJudge.from_path(FIELD_GUIDE_TAXONOMY)
    expected = [truth.category(pair.ground_truth, pair.answer) for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        server = LocalJudgeServer(FIELD_GUIDE_TAXONOMY, faults=faults_text(form))
        with server:
            config = JudgeConfig(
                kind="endpoint", endpoints=(server.url,), model="drill", model_revision="1",
                concurrency=concurrency, timeout_s=timeout_s, max_retries=100,
                # Four failures of five are no outage in `each`; a long enough run still is.
                breaker_failures=30 if form == "each" else 3, unparsable_retries=100,
                backoff_s=0.05, backoff_max_s=0.5, structured="choice",
                cache_path=str(Path(folder) / "cache.sqlite"),
            )  # fmt: skip
            result = asyncio.run(ask(config, pairs))
            with urllib.request.urlopen(server.url.removesuffix("/v1") + "/stats") as response:
                served = json.loads(response.read())
    return make_report(form, pairs, expected, result, served)


def make_report(form, pairs, expected, result, served) -> dict[str, object]:
    """Counts what was lost, invented, asked twice."""
    outcomes, stats, samples = result["outcomes"], result["stats"], result["samples"]
    lost = sum(not isinstance(outcome, Verdict) for outcome in outcomes)
    wrong = sum(
        isinstance(outcome, Verdict) and outcome.category != category
        for outcome, category in zip(outcomes, expected, strict=True)
    )
    fifth = samples[len(samples) // 5 :] or [resident_mb()]
    return {
        "faults": form,
        "pairs": len(pairs),
        "lost": lost,
        "invented": wrong,
        "answered_again": served["answered_again"],
        "http_requests": served["requests"],
        "faults_served": {k: v for k, v in sorted(served.items()) if k.startswith("fault_")},
        "labels_per_s": round(len(pairs) / result["uncached_s"], 1),
        "requests_per_s": round(served["requests"] / result["uncached_s"], 1),
        "cached_labels_per_s": round(len(pairs) / result["cached_s"]),
        "cached_cold_labels_per_s": round(len(pairs) / result["cold_s"]),
        "rss_mb_after_a_fifth": round(fifth[0], 1),
        "rss_mb_at_the_end": round(fifth[-1], 1),
        "rss_mb_highest": round(max(fifth), 1),
        "pause_s": round(stats["judge/pause_s"], 2),
    }


def shortcomings(report: dict[str, object]) -> list[str]:
    """What a report falls short of."""
    growth = report["rss_mb_highest"] - report["rss_mb_after_a_fifth"]
    unserved = [kind for kind in FAULT_KINDS if f"fault_{kind}" not in report["faults_served"]]
    checks = {
        f"{report['lost']} pairs lost": report["lost"] == 0,
        f"{report['invented']} labels invented": report["invented"] == 0,
        f"never served: {unserved}": not unserved,
        f"memory grew by {growth:.0f} MB": growth <= MOST_GROWTH_MB,
    }
    if report["faults"] == "spread":
        uncached, cached = report["labels_per_s"], report["cached_labels_per_s"]
        checks[f"{uncached} labels/s uncached"] = uncached >= LEAST_UNCACHED
        checks[f"{cached} labels/s cached"] = cached >= LEAST_CACHED
    return [what for what, is_met in checks.items() if not is_met]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000, help="pairs to label")
    parser.add_argument("--faults", choices=("spread", "each"), default="spread")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--timeout_s", type=float, default=5.0)
    args = parser.parse_args()
    report = drill(args.requests, args.faults, args.concurrency, args.timeout_s)
    print(json.dumps(report))
    missed = shortcomings(report)
    print("; ".join(missed) or "ok", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
