"""Drill: the judge is killed in mid-training, for a minute and for good.

    python -m tests.drills.outage [--outage_s 60]

Trains small runs: one with a judge that stays, one whose judge is killed after the first step and
restarted after `outage_s`, and one by command line whose judge never returns. Prints one JSON
object; exit code 1 if a metric differs, a rollout without a label was rewarded, or the last run
does not stop within its limit with exit code 1, saved and resumable.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from speciarl_jax.judge.store.verdict_log import VerdictLog
from speciarl_jax.monitor import writer
from tests.support.outage import judge_server, port_of, train_through_outage

LIMIT_S = 15.0  # judge.pause_budget_s of the run whose judge never returns
ROOT = pathlib.Path(__file__).parents[2]


def drill_outage(folder: pathlib.Path, outage_s: float) -> dict[str, object]:
    """A run through an outage against a run without one."""
    started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        calm, outage = train_through_outage(folder, outage_s)
    return {
        "outage_s": outage_s,
        "seconds_both_runs": round(time.monotonic() - started, 1),
        "steps": len(outage),
        "pause_s": round(outage[-1]["judge/pause_s"], 1),
        "failed_labels": outage[-1]["judge/failed"],
        "metrics_equal": list(map(writer.deterministic, outage))
        == list(map(writer.deterministic, calm)),
    }


def train_command(workdir: pathlib.Path, url: str, *options: str) -> list[str]:
    """`speciarl train` of the smoke recipe against a judge at `url`."""
    return [
        sys.executable, "-m", "speciarl_jax.cli", "train", "--config=configs/cpu_smoke.py",
        f"--workdir={workdir}", "--config.judge.kind=endpoint", "--config.judge.model=drill",
        f"--config.judge.endpoints=('{url}',)", "--config.judge.has_cascade=false",
        f"--config.judge.pause_budget_s={LIMIT_S}", "--config.eval.score_base=false",
        "--config.eval.score_trained=false", "--config.eval.best_of=0",
        "--config.train.eval_every=0", "--config.train.save_every=1", *options,
    ]  # fmt: skip


def drill_gone(folder: pathlib.Path) -> dict[str, object]:
    """A run whose judge is killed and never returns, then resumed with another."""
    workdir = folder / "gone"
    with judge_server() as server:
        port = port_of(server)
        command = train_command(workdir, server.url, "--config.train.num_steps=60")
        run = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=sys.stderr, text=True
        )
        while run.poll() is None and not _rows(workdir):
            time.sleep(0.05)
    if run.poll() is not None:
        raise SystemExit(f"the run ended before its first step: {run.communicate()[1]}")
    killed = time.monotonic()
    _, errors = run.communicate()
    took, done = time.monotonic() - killed, len(_rows(workdir))
    log = VerdictLog(str(workdir / "verdicts.sqlite"))
    unlabelled = [row for row in log.rows() if row.category.startswith("failed")]
    log.close()
    with judge_server(port) as again:
        options = [f"--config.train.num_steps={done + 1}", "--resume"]
        command = train_command(workdir, again.url, *options)
        resumed = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    return {
        "exit_code": run.returncode,
        "stopped_after_s": round(took, 1),
        "limit_s": LIMIT_S,
        "error": errors.strip().splitlines()[-1],
        "steps_done": done,
        "failed_labels_in_log": len(unlabelled),
        "most_unlabelled_rollouts": max(r["category/judge_failure_frac"] for r in _rows(workdir)),
        "resumed_exit_code": resumed.returncode,
        "steps_after_resume": len(_rows(workdir)),
    }


def _rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    file = workdir / "metrics.jsonl"
    return writer.read_rows(file) if file.is_file() else []


def shortcomings(report: dict[str, dict[str, object]]) -> list[str]:
    """What the drill falls short of."""
    outage, gone = report["outage"], report["gone"]
    checks = {
        "metrics differ after the outage": outage["metrics_equal"],
        "no pause was counted": outage["pause_s"] > outage["outage_s"] - 5.0,
        "labels failed": outage["failed_labels"] == 0,
        "exit code is not 1": gone["exit_code"] == 1,
        "not stopped within the limit": gone["stopped_after_s"] < LIMIT_S + 30.0,
        "the error does not name the judge": "judge down for" in gone["error"],
        "a rollout had no label": not gone["most_unlabelled_rollouts"],
        "failed labels in the log": not gone["failed_labels_in_log"],
        "not resumable": gone["resumed_exit_code"] == 0
        and gone["steps_after_resume"] == gone["steps_done"] + 1,
    }
    return [what for what, is_met in checks.items() if not is_met]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outage_s", type=float, default=60.0, help="seconds without a judge")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        report = {"outage": drill_outage(path, args.outage_s), "gone": drill_gone(path)}
    print(json.dumps(report))
    missed = shortcomings(report)
    print("; ".join(missed) or "ok", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
