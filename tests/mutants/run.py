"""`make mutants`: plants one fault after the other and sees whether a test fails.

    python -m tests.mutants.run [--jobs 2] [--core 0] [--limit N] [--file objective/loss.py]

Works on copies of the tree in .mutants/, a fresh process each. A second call goes on; a fault whose
file has changed since is tried again. Writes docs/mutants.json and prints the table; survivors that
were judged equivalent stand with their reason in tests/mutants/equivalent.json. Exits 1 if fewer
than nine in ten are killed or more than one in twenty is called equivalent.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import difflib
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import sys
import time

from speciarl_jax.files import write_whole
from tests.mutants.child import LIBRARIES, run_tests
from tests.mutants.faults import FAULTS, Fault
from tests.mutants.sites import PACKAGE, ROOT, Mutant, all_mutants

WORK = ROOT / ".mutants"
RESULTS = ROOT / "docs" / "mutants.json"
EQUIVALENT = pathlib.Path(__file__).parent / "equivalent.json"
_SERVER = multiprocessing.get_context("forkserver")
TIMEOUT_S = 900.0  # the tests of a room take a minute or two, more beside other work
LEAST_KILLED, MOST_EQUIVALENT = 0.9, 0.05
_COPIED = ("speciarl_jax", "tests", "configs", "docs", "tpu_scripts", "pyproject.toml", "setup.py")


def copy_tree(number: int) -> pathlib.Path:
    """A copy of the working tree for one worker."""
    tree = WORK / f"tree{number}"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in (*_COPIED, "Makefile", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)
    return tree


def run_apart(tree: pathlib.Path, tests: tuple[str, ...], core: int) -> tuple[bool, str]:
    """Runs tests on a copy of the tree in a process of its own.

    Returns:
        Whether they failed, and which did first.
    """
    log = tree.with_suffix(".log")
    process = _SERVER.Process(target=run_tests, args=(str(tree), tests, core, str(log)))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return True, "time limit"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    first = failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"exit {process.exitcode}"
    return process.exitcode != 0, first if process.exitcode else ""


def outcome(mutant: Mutant | Fault, tree: pathlib.Path, core: int) -> dict[str, object]:
    """Plants the fault in a copy, runs its tests, takes it out again."""
    file = tree / PACKAGE / mutant.file
    whole = file.read_text()
    mutated = mutant.source()
    start = time.monotonic()
    file.write_text(mutated)
    is_killed, killer = run_apart(tree, mutant.tests, core)
    file.write_text(whole)
    change = [
        line
        for line in difflib.unified_diff(whole.splitlines(), mutated.splitlines(), n=0, lineterm="")
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    return {
        "killed": is_killed,
        "by": killer,
        "seconds": round(time.monotonic() - start, 1),
        "digest": mutant.digest,
        "change": change,
    }


def read_results() -> dict[str, dict[str, object]]:
    """What has been tried, by the mutant's name."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def write_results(results: dict[str, dict[str, object]]) -> None:
    """One line a mutant."""
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    write_whole(RESULTS, "{\n" + ",\n".join(lines) + "\n}\n")


def table(results: dict[str, dict[str, object]], mutants: list[Mutant]) -> tuple[str, bool]:
    """Killed, survived and equivalent by file; whether the score is reached."""
    judged = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.is_file() else {}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        found = results.get(mutant.name)
        kind = "killed" if found and found["killed"] else "survived"
        if not found or found["digest"] != mutant.digest:
            kind = "not tried"
        elif kind == "survived" and mutant.name in judged:
            kind = "equivalent"
        counts[mutant.file][kind] += 1
    kinds = ("killed", "survived", "equivalent", "not tried")
    lines = [f"| file | {' | '.join(kinds)} |", "|---" * 5 + "|"]
    for file, found in counts.items():
        lines.append(f"| `{file}` | {' | '.join(str(found[kind]) for kind in kinds)} |")
    total = sum(counts.values(), collections.Counter())
    lines.append(f"| **all** | {' | '.join(str(total[kind]) for kind in kinds)} |")
    tried = total["killed"] + total["survived"] + total["equivalent"]
    real = tried - total["equivalent"]
    killed = total["killed"] / real if real else 0.0
    lines.append(f"\nkilled {killed:.3f} of those that are not equivalent; {tried} tried")
    is_reached = killed >= LEAST_KILLED and total["equivalent"] <= MOST_EQUIVALENT * tried
    return "\n".join(lines), is_reached and not total["not tried"]


def main(jobs: int, limit: int, file: str, core: int) -> int:
    """Tries what is missing; returns the exit code."""
    mutants = all_mutants()
    results = read_results()
    waiting = [
        m
        for m in (*FAULTS, *mutants)
        if results.get(m.name, {}).get("digest") != m.digest and file in ("", m.file)
    ][: limit or None]
    print(f"{len(mutants)} mutants, {len(waiting)} to try", flush=True)
    _SERVER.set_forkserver_preload(LIBRARIES)
    trees: queue.Queue[tuple[pathlib.Path, int]] = queue.Queue()
    for number in range(jobs if waiting else 0):
        trees.put((copy_tree(number), (core + number) % (os.cpu_count() or 1)))

    sound: set[tuple[str, ...]] = set()

    def attempt(mutant: Mutant | Fault) -> dict[str, object]:
        tree, its_core = trees.get()
        try:
            if mutant.tests not in sound:  # tests that fail by themselves kill everything
                has_failed, first = run_apart(tree, mutant.tests, its_core)
                if has_failed:
                    raise RuntimeError(f"without any fault {first} fails, see {tree}.log")
                sound.add(mutant.tests)
            return outcome(mutant, tree, its_core)
        finally:
            trees.put((tree, its_core))

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for mutant, found in zip(waiting, pool.map(attempt, waiting), strict=True):
            results[mutant.name] = found
            write_results(results)
            if not found["killed"]:
                print(f"survived: {mutant.name}  {found['change']}", flush=True)
    text, is_reached = table(results, mutants)
    print(text)
    print("\n| fault | the test that fails |\n|---|---|")
    for fault in FAULTS:
        found = results.get(fault.name, {"by": "not tried"})
        print(f"| {fault.title} | {found['by'] or '**none**'} |")
        is_reached &= bool(found["by"])
    return 0 if is_reached else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, default=0, help="mutants, 0 for all")
    parser.add_argument("--core", type=int, default=0, help="the first to use")
    parser.add_argument("--file", default="", help="only of this file, below the package")
    arguments = parser.parse_args()
    sys.exit(main(arguments.jobs, arguments.limit, arguments.file, arguments.core))
