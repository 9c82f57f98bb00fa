"""The Vertex AI launcher's job specification; offline, without credentials."""

import importlib.util
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[2] / "tpu_scripts" / "vertex.py"
ARGUMENTS = {
    "project": "p",
    "region": "us-west1",
    "image": "us-docker.pkg.dev/p/r/i:t",
    "bucket": "gs://b",
    "accelerator": "v5e",
    "topology": "4x4",
    "judge_url": "http://h:8000/v1",
    "eval_judge_url": "http://h:8001/v1",
    "config": "configs/qwen2_5_vl_7b_v5e.py",
}


@pytest.fixture(scope="module")
def vertex():
    spec = importlib.util.spec_from_file_location("vertex_launcher", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(**changes):
    return [f"--{k}={v}" for k, v in (ARGUMENTS | changes).items()]


def dry_run(vertex, capsys, *more, **changes):
    assert vertex.main([*words(**changes), "--dry_run", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_dry_run_prints_the_specification(vertex, capsys):
    spec = dry_run(vertex, capsys, "--spot", "--", "--config.seed=1")
    (pool,) = spec["worker_pool_specs"]
    assert pool["machine_spec"] == {"machine_type": "ct5lp-hightpu-4t", "tpu_topology": "4x4"}
    assert spec["scheduling"]["strategy"] == "SPOT"
    container = pool["container_spec"]
    assert container["command"] == ["/app/tpu_scripts/restart.sh", "gs://b/runs/speciarl"]
    assert container["args"] == [
        "--config=configs/qwen2_5_vl_7b_v5e.py",
        "--config.judge.endpoints=('http://h:8000/v1',)",
        "--config.eval.judge.endpoints=('http://h:8001/v1',)",
        "--config.compile_cache_dir=gs://b/runs/xla-cache",
        "--cluster",
        "--config.seed=1",
    ]


def test_gpus_are_one_machine(vertex, capsys):
    (pool,) = dry_run(vertex, capsys, accelerator="h100", topology="1")["worker_pool_specs"]
    machine = pool["machine_spec"]
    assert (machine["accelerator_type"], machine["accelerator_count"]) == ("NVIDIA_H100_80GB", 8)
    assert "--cluster" not in pool["container_spec"]["args"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator": "v9"}, "--accelerator=v9: expected one of v5e"),
        ({"topology": "1x2"}, "2 chips do not fill machines of 4"),
        ({"topology": "4xb"}, "expected sizes such as 4x4"),
        ({"accelerator": "h100", "topology": "3"}, "on one machine only"),
        ({"bucket": "b"}, "--bucket=b: expected gs://"),
    ],
)
def test_bad_usage_is_one_line(vertex, capsys, changes, message):
    assert vertex.main([*words(**changes), "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_the_environment_asks_for_a_dry_run_too(vertex, capsys, monkeypatch):
    monkeypatch.setenv("DRY_RUN", "1")
    assert vertex.main(words()) == 0
    assert json.loads(capsys.readouterr().out)["display_name"] == "speciarl"


@pytest.mark.parametrize("accelerator", ["v5e", "v6e", "h100", "a100", "h200"])
def test_vertex_accepts_the_fields(vertex, capsys, accelerator):
    types = pytest.importorskip("google.cloud.aiplatform_v1.types")
    topology = "4x4" if accelerator.startswith("v") else "1"
    spec = dry_run(vertex, capsys, accelerator=accelerator, topology=topology)
    for pool in spec["worker_pool_specs"]:
        assert types.WorkerPoolSpec(pool).replica_count == pool["replica_count"]
    assert types.Scheduling.Strategy[spec["scheduling"]["strategy"]]
