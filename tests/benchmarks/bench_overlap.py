"""What a judge's latency costs a training step, with and without ``train.async_steps``.

    python tests/benchmarks/bench_overlap.py [--latency_s 2] [--prompts 128] [--rounds 5]

Prints one JSON object. Two local judge servers label alike, one at once and one after `latency_s`,
both with unlimited concurrency; the label cache starts empty at every step, so every step waits for
real requests. The four runs take turns within each round, so other work on the machine falls on all
of them. Ratios are of medians, slow judge to instant judge in the same mode.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import platform
import statistics
import subprocess
import time

import jax

from speciarl_jax.algorithm.overlap import run_overlapped_step
from speciarl_jax.algorithm.step import run_step
from speciarl_jax.config.judge import FIELD_GUIDE_TAXONOMY, JudgeConfig
from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.config.schema import Config
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.judge.runner import JudgeThread
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from speciarl_jax.rollout.groups import RolloutBatch
from speciarl_jax.run.opening import open_train_loader
from speciarl_jax.run.session import Session, open_session
from speciarl_jax.run.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Runner:
    """One of the four runs: its state, its judge, what its steps reported."""

    session: Session
    url: str
    is_ahead: bool

    def __post_init__(self) -> None:
        """Starts at step 0."""
        config = self.session.config
        self.optimizer = make_optimizer(config.optim, 1000)
        trainable = jax.tree.map(lambda x: x.copy(), self.session.parts.trainable)
        optim = init_optimizer(self.optimizer, trainable)
        self.state = TrainState(trainable, optim, 0, {})
        self.loader = open_train_loader(self.session)
        self.ahead: RolloutBatch | None = None
        self.judges: list[JudgeThread] = []
        self.rows: list[dict[str, float]] = []

    def step(self) -> None:
        """One step with a judge that has seen no pair; the last step's labels may be under way."""
        judge = JudgeThread(
            JudgeConfig(
                kind="endpoint",
                model="judge",
                endpoints=(self.url,),
                concurrency=10_000,
                has_cascade=False,
            )
        )
        judge.check_health()  # as `train.main` does: the first request of a judge is a probe
        self.judges.append(judge)
        parts = (self.session, judge, self.optimizer, self.state, self.loader)
        start = time.perf_counter()
        if self.is_ahead:
            result = run_overlapped_step(*parts, self.ahead, is_last=False)
        else:
            result = run_step(*parts)
        seconds = time.perf_counter() - start
        self.state, self.ahead = result.state, result.ahead
        self.rows.append({**result.metrics, "seconds": seconds})
        while len(self.judges) > 1:
            self.judges.pop(0).close()

    def close(self) -> None:
        """Ends judge and loader."""
        for judge in self.judges:
            judge.close()
        self.loader.close()

    def median(self, name: str) -> float:
        """Of the steps after the two that compile."""
        return statistics.median(row[name] for row in self.rows[2:])


def make_config(prompts: int, is_ahead: bool) -> Config:
    """The smoke recipe with a larger batch, so that decoding takes longer than the latency."""
    config, _ = load_recipe(str(ROOT / "configs" / "cpu_smoke.py"), [])
    train = config.train
    train.prompts_per_step = train.prompts_per_update = prompts
    if is_ahead:
        train.async_steps, config.algo.importance_cap = 1, 2.0
    train.prompts_per_micro_batch = 16
    config.mesh.data = 1
    config.validate()
    return config


def measure(prompts: int, latency_s: float, rounds: int) -> dict[str, object]:
    """Median seconds of a step and of its parts in the four runs, and the two ratios."""
    with contextlib.ExitStack() as stack:
        faults = {"instant": "", "slow": f"latency={latency_s}"}
        urls = {
            name: stack.enter_context(LocalJudgeServer(FIELD_GUIDE_TAXONOMY, faults=fault)).url
            for name, fault in faults.items()
        }
        runners = {}
        for mode in ("sync", "async"):
            session = open_session(make_config(prompts, mode == "async"))
            for judge, url in urls.items():
                runners[mode, judge] = Runner(session, url, mode == "async")
                stack.callback(runners[mode, judge].close)
        for _ in range(rounds + 2):
            for runner in runners.values():
                runner.step()
    names = ("seconds", "time/rollout_s", "time/judge_s", "time/update_s")
    table = {
        f"{mode}/{judge}": {name: round(runner.median(name), 3) for name in names}
        for (mode, judge), runner in runners.items()
    }
    ratios = {
        f"{mode}_ratio": round(
            table[f"{mode}/slow"]["seconds"] / table[f"{mode}/instant"]["seconds"], 3
        )
        for mode in ("sync", "async")
    }
    return {**ratios, "runs": table}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency_s", type=float, default=2.0)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    result = {
        "benchmark": "overlap",
        "commit": commit.stdout.strip(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.platform(),
        **vars(args),
        **measure(args.prompts, args.latency_s, args.rounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
