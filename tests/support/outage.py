"""A judge on a local port that goes away and comes back."""

import threading
import time

from speciarl_jax import train
from speciarl_jax.config.judge import FIELD_GUIDE_TAXONOMY
from speciarl_jax.judge.offline.server import LocalJudgeServer
from speciarl_jax.monitor import writer
from tests.support.training import QUIET, rows, small_config


def judge_server(port=0):
    return LocalJudgeServer(FIELD_GUIDE_TAXONOMY, port=port)


def port_of(server):
    return int(server.url.split(":")[2].split("/")[0])


def endpoint_config(port, **changes):
    return small_config(
        train__num_steps=3,
        judge__kind="endpoint",
        judge__model="judge",
        judge__endpoints=(f"http://127.0.0.1:{port}/v1",),
        judge__has_cascade=False,
        judge__timeout_s=5.0,
        judge__backoff_s=0.05,
        judge__backoff_max_s=0.2,
        **QUIET,
        **changes,
    )


def train_through_outage(folder, outage_s):
    """One run with a judge, one whose judge is killed after the first step and comes back.

    Returns the rows of both, times and judge counters included.
    """
    with judge_server() as server:
        train.main(endpoint_config(port_of(server)), folder / "calm")
    first = judge_server()
    first.start()
    port, workdir, again = port_of(first), folder / "outage", []

    def kill_and_restart():
        while not (workdir / "metrics.jsonl").is_file() or not rows(workdir):
            time.sleep(0.01)
        first.stop()
        time.sleep(outage_s)
        again.append(judge_server(port))
        again[0].start()

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    train.main(endpoint_config(port), workdir)
    thread.join()
    again[0].stop()
    return [writer.read_rows(folder / name / "metrics.jsonl") for name in ("calm", "outage")]
