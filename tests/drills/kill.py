"""Drill: a run killed 20 times, some of them in the middle of a save, ends like one never killed.

Then SIGTERM at random moments: saved and gone with exit code 75. Prints one JSON object; exits 1 if
a metric differs, more than a save is lost, or leaving takes longer than 15 s. `make drill` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from speciarl_jax.monitor.writer import deterministic, read_rows

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "cpu_smoke.py"
SAVE_EVERY = 2
SETTINGS = [
    "eval.score_base=false",
    "eval.score_trained=false",
    "eval.best_of=0",
    "train.eval_every=0",
    f"train.save_every={SAVE_EVERY}",
]
GRACE_S = 15.0


def start(workdir: pathlib.Path, num_steps: int) -> subprocess.Popen[bytes]:
    """The training process, resuming if there is something to resume."""
    command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--config={RECIPE}"]
    command += [f"--workdir={workdir}", f"--config.train.num_steps={num_steps}"]
    command += [f"--config.{setting}" for setting in SETTINGS]
    if (workdir / "config.json").is_file():
        command.append("--resume")
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    with log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)


def last_step(workdir: pathlib.Path) -> int:
    """Of the metrics file."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def last_save(workdir: pathlib.Path) -> int:
    """Newest complete checkpoint."""
    steps = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(map(int, steps), default=0)


def wait_for_moment(
    process: subprocess.Popen[bytes], workdir: pathlib.Path, step: int, is_save: bool
) -> None:
    """Until the run has passed `step`, plus a random while; or until it is saving."""
    while process.poll() is None and last_step(workdir) < step:
        time.sleep(0.02)
    if not is_save:
        time.sleep(random.uniform(0, 2))
        return
    while process.poll() is None:
        if any((workdir / "checkpoints").glob("*tmp*")):
            return
        time.sleep(0.001)


def kill_often(workdir: pathlib.Path, num_steps: int, kills: int) -> dict[str, int]:
    """Kills and resumes until the run is done; how often, and the most steps that were lost."""
    done, in_save, most_lost = 0, 0, 0
    while True:
        process = start(workdir, num_steps)
        is_save = done % 4 == 3
        if done < kills:
            wait_for_moment(process, workdir, last_save(workdir) + 1, is_save)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done, in_save = done + 1, in_save + is_save
                most_lost = max(most_lost, last_step(workdir) - last_save(workdir))
                continue
        if process.wait() != 0:
            raise SystemExit(f"a resumed run failed; see {workdir}.log")
        return {"kills": done, "in_a_save": in_save, "most_steps_lost": most_lost}


def stop_often(workdir: pathlib.Path, stops: int) -> list[dict[str, float]]:
    """SIGTERM at random moments after warm-up; exit code and seconds of each."""
    found = []
    for _ in range(stops):
        process = start(workdir, 10_000)
        wait_for_moment(process, workdir, last_save(workdir) + 2, is_save=False)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - sent
        found.append({"code": code, "seconds": round(seconds, 2), "saved": last_save(workdir)})
    return found


def main() -> int:
    """Runs the drill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    num_steps = 2 * args.kills + 4
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = pathlib.Path(folder) / "calm", pathlib.Path(folder) / "killed"
        if start(calm, num_steps).wait() != 0:
            raise SystemExit((calm.parent / "calm.log").read_text()[-2000:])
        counts = kill_often(killed, num_steps, args.kills)
        rows = [
            [deterministic(row) for row in read_rows(workdir / "metrics.jsonl")]
            for workdir in (calm, killed)
        ]
        stops = stop_often(pathlib.Path(folder) / "stopped", args.stops)
    report = {**counts, "steps": num_steps, "is_bit_equal": rows[0] == rows[1], "stops": stops}
    print(json.dumps(report))
    is_calm = all(stop["code"] == 75 and stop["seconds"] <= GRACE_S for stop in stops)
    return int(not (report["is_bit_equal"] and is_calm and counts["most_steps_lost"] <= SAVE_EVERY))


if __name__ == "__main__":
    sys.exit(main())
