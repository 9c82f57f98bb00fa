"""The drill's lies are lies: each holds a wrong label where it holds one, and none is believed."""

import asyncio
import json
import random

import aiohttp
import pytest

from speciarl_jax.judge.client import JudgeClient
from speciarl_jax.judge.offline.app import serve
from speciarl_jax.judge.offline.faults import FAULT_KINDS, FaultPlan
from speciarl_jax.judge.offline.lies import LIES, disown, mislabel
from speciarl_jax.judge.remote.prompt import load_prompt
from speciarl_jax.types import Category
from tests.support.hostile_server import completion


@pytest.mark.parametrize("label", [category.label for category in Category])
def test_mislabel_changes_every_label_and_nothing_else(label):
    honest = completion(json.dumps({"1": label, "2": "correct"}))
    before = json.dumps(honest)
    wrong = json.loads(mislabel(honest)["choices"][0]["message"]["content"])
    assert wrong["1"] != label
    assert Category.from_label(wrong["1"]) in Category
    assert wrong["2"] == "incorrect"
    assert json.dumps(honest) == before


def test_each_sign_of_disowning_is_drawn():
    signs = {json.dumps(disown(completion("generic"), random.Random(seed))) for seed in range(50)}
    assert len(signs) == 4
    assert not any('"generic"' in sign for sign in signs)


def test_lies_are_faults():
    assert set(LIES) < set(FAULT_KINDS)


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("size", [1, 4])
def test_no_lie_is_believed_and_no_label_lost(
    kind, size, number_judge, fast_config, pairs_of, expect
):
    plan = FaultPlan.parse(f"{kind}=0.4,seed=1")
    settings = {"max_retries": 60, "unparsable_retries": 60, "concurrency": 8, "timeout_s": 20.0}
    if size > 1:
        settings |= {"prompt": "six_way_batch_v2", "pairs_per_request": size, "structured": "none"}

    async def run():
        async with serve(number_judge, faults=plan) as url:
            async with aiohttp.ClientSession() as session:  # what a trusting client gets
                message = {"role": "user", "content": '{"ground_truth": "a", "answer": "name 2"}'}
                said = []
                for _ in range(12):
                    try:
                        body = {"messages": [message]}
                        async with session.post(url + "/chat/completions", json=body) as response:
                            said.append(await response.text())
                    except aiohttp.ClientError as error:
                        said.append(str(error))
            async with JudgeClient(fast_config(url, **settings)) as judge:
                judge._pool.probe_waits_s = (0.0, 0.01)
                return said, await asyncio.wait_for(judge.label(pairs_of(60)), 60), judge.stats()

    said, outcomes, stats = asyncio.run(run())
    assert [o.category for o in outcomes] == [expect(f"name {n}") for n in range(60)]
    assert stats["judge/failed"] == 0
    if kind in ("flood", "307", "disown", "choices", "twice"):  # `bomb` says more_specific
        assert "less_specific" in "".join(said)  # where `name 2` is generic
    assert load_prompt("six_way_batch_v2").has_ids
