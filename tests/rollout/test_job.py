"""Processes that sample as one program give what one process gives, and end together.

`tests.support.job_worker` has the scenarios; each job runs its own in one go.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.support import job_worker
from tests.support.training import ROOT, free_port

pytestmark = pytest.mark.slow
# name: (processes, devices of each, fsdp, tensor)
JOBS = {
    "data": (2, 1, 1, 1),
    "data and tensor": (2, 2, 1, 2),
    "tensor over two": (2, 1, 1, 2),
    "fsdp over two": (2, 1, 2, 1),
    "two replicas over four": (4, 1, 1, 2),
}


@functools.cache
def run_job(name, *scenarios):
    """What each process of a job prints."""
    count, devices, fsdp, tensor = JOBS[name]
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command, port = [sys.executable, "-m", "tests.support.job_worker"], free_port()
    workers = []
    for index in range(count):
        numbers = [str(x) for x in (port, count, index, fsdp, tensor)]
        pipe = subprocess.PIPE
        workers.append(
            subprocess.Popen(
                [*command, *numbers, *scenarios],
                stdout=pipe,
                stderr=pipe,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        )
    found = []
    for worker in workers:
        output, errors = worker.communicate(timeout=580)
        assert worker.returncode == 0, errors[-3000:]
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        found.append(json.loads(line.removeprefix("RESULT ")))
    return found


@pytest.fixture(scope="module")
def alone():
    """Answers of one process with one device."""
    session, vocabulary = job_worker.open_job(1, 1, 1)
    loader = job_worker.open_train_loader(session)
    answers = job_worker.plain(job_worker.Job(session, next(loader), vocabulary))["answers"]
    loader.close()
    assert len({len(answer) for answer in answers.values()}) > 1  # rows finish at different times
    return answers


def answers_of(parts, num_shares):
    """Those of all processes; the ones that have the same prompts have the same answers."""
    sharing, joined = len(parts) // num_shares, {}
    for first in range(0, len(parts), sharing):
        own = [part["answers"] for part in parts[first : first + sharing]]
        assert all(other == own[0] for other in own)
        assert not joined.keys() & own[0].keys()
        joined |= own[0]
    return joined


@pytest.mark.parametrize(
    ("name", "num_shares"),
    [
        ("data and tensor", 2),
        ("tensor over two", 1),
        ("fsdp over two", 2),
        ("two replicas over four", 2),
    ],
)
def test_any_mesh_samples_what_one_device_samples(name, num_shares, alone):
    parts = [part["plain"] for part in run_job(name, "plain", "judge")]
    assert answers_of(parts, num_shares) == alone
    assert len({part["steps"] for part in parts}) == 1


@pytest.fixture(scope="module")
def scenarios():
    """Two processes that run every scenario."""
    return run_job("data", *(scenario.__name__ for scenario in job_worker.SCENARIOS))


@pytest.mark.parametrize("scenario", ["plain", "buckets", "padding", "waves"])
def test_uneven_hosts_sample_what_one_device_samples(scenario, scenarios, alone):
    first, second = (part[scenario] for part in scenarios)
    answers = answers_of([first, second], 2)
    real = {"padding": 2, "waves": 3}.get(scenario, job_worker.PROMPTS)
    assert answers == {k: v for k, v in alone.items() if int(k.split("/")[0]) < real}
    assert second["answers"] or scenario == "padding"
    # The same work was launched in both.
    work = [{k: v for k, v in part.items() if k != "answers"} for part in (first, second)]
    assert work[0] == work[1]
    assert work[0]["waves"] == (2 if scenario == "waves" else 1)
    assert work[0]["shape"] == [64 if scenario == "buckets" else 48]


def test_rows_that_wait_on_their_hosts_sample_the_same(scenarios):
    """The fullest shard decides for all when half of the rows are parked, and how many."""
    first, second = (part["spill"] for part in scenarios)
    assert first["answers"] == first["whole"]["answers"]
    assert second["answers"] == second["whole"]["answers"]
    assert len(first["answers"]) == 2 * len(second["answers"]) == 32
    assert first["waves"] == second["waves"] == 1
    assert first["parked"] == second["parked"] >= 2 > first["whole"]["parked"]
    assert first["steps"] == second["steps"] > first["whole"]["steps"]


def test_stop_strings_of_one_host_end_its_rows_only(scenarios, alone):
    first, second = (part["early"] for part in scenarios)
    assert first["answers"] == {k: alone[k] for k in first["answers"]}
    assert {len(answer) for answer in second["answers"].values()} == {1}
    assert first["steps"] == second["steps"] > 4


def test_a_stop_of_one_process_is_one_of_all_in_the_same_chunk(scenarios):
    first, second = (part["stop"] for part in scenarios)
    assert first == {"looks": 3, "own": False}
    assert second == {"looks": 3, "own": True}


def test_logits_that_are_not_finite_on_one_host_end_all(scenarios):
    first, second = (part["sick"] for part in scenarios)
    assert second["error"].startswith("prompt ")
    assert first["error"] == f"process 1: {second['error']}"
    assert {part["kind"] for part in (first, second)} == {"TrainingStopped"}
    assert first["is_shared"]
    assert second["is_shared"]


def test_a_judge_that_gives_up_ends_all(scenarios):
    first, second = (part["judge"] for part in scenarios)
    assert second["error"] == "nobody answers"
    assert first["error"] == "process 1: nobody answers"


@pytest.mark.parametrize(
    ("name", "sharing"), [("tensor over two", 2), ("two replicas over four", 2)]
)
def test_one_of_those_that_share_prompts_asks_the_judge(name, sharing):
    for index, part in enumerate(run_job(name, "plain", "judge")):
        found = part["judge"]
        assert found["good"]
        assert found["answered"] > 0
        assert found["asked"] == (0 if index % sharing else found["answered"])


def test_warm_up_leaves_nothing_to_compile(scenarios):
    for part in (part["warm"] for part in scenarios):
        assert part["first"] > 0
        assert (part["again"], part["recompilations"]) == (0, 0)
