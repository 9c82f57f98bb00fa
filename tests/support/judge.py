"""A small tree, a scripted judge, and a fast configuration, shared by the judge's tests."""

import json
from pathlib import Path

import pytest

from speciarl_jax.config.judge import JudgeConfig
from speciarl_jax.judge.base import Pair
from speciarl_jax.types import Category

TREE = {
    "name": "living thing",
    "children": [
        {
            "name": "bird",
            "synonyms": ["aves"],
            "level": "domain",
            "children": [
                {
                    "name": "songbird",
                    "level": "family",
                    "children": [
                        {
                            "name": "finch",
                            "level": "genus",
                            "children": [
                                {
                                    "name": "scarlet finch",
                                    "synonyms": ["Fringella coccinea"],
                                    "level": "species",
                                    "children": [{"name": "island scarlet finch"}],
                                },
                                {"name": "golden finch", "level": "species"},
                            ],
                        },
                        {
                            "name": "sparrow",
                            "level": "genus",
                            "children": [{"name": "black and white sparrow"}],
                        },
                    ],
                }
            ],
        },
        {"name": "flower", "children": [{"name": "lily", "children": [{"name": "tiger lily"}]}]},
    ],
}


class NumberJudge:
    """A scripted judge whose label can be worked out from the answer `name <number>`."""

    def category(self, ground_truth: str, answer: str) -> Category:
        if answer == "canary pair":
            return Category.SPECIFIC
        return expected_category(answer)


def expected_category(answer: str) -> Category:
    return Category(int(answer.rsplit(" ", 1)[-1]) % len(Category))


def numbered_pairs(count: int, start: int = 0) -> list[Pair]:
    return [Pair("some truth", f"name {number}") for number in range(start, start + count)]


@pytest.fixture
def tree_path(tmp_path: Path) -> Path:
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(TREE), encoding="utf-8")
    return path


@pytest.fixture
def number_judge() -> NumberJudge:
    return NumberJudge()


@pytest.fixture
def pairs_of():
    return numbered_pairs


@pytest.fixture
def expect():
    return expected_category


@pytest.fixture
def fast_config():
    """Makes an endpoint configuration with short waits; keyword arguments override."""

    def make(*endpoints: str, **overrides) -> JudgeConfig:
        values = {
            "kind": "endpoint",
            "endpoints": endpoints,
            "model": "scripted",
            "structured": "choice",
            "backoff_s": 0.01,
            "backoff_max_s": 0.05,
            "timeout_s": 5.0,
            "pause_budget_s": 10.0,
            "concurrency": 32,
        }
        return JudgeConfig(**{**values, **overrides})

    return make
