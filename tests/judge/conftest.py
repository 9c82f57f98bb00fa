"""Fixtures of the judge's tests."""

from tests.support.judge import (
    expect,
    fast_config,
    number_judge,
    pairs_of,
    tree_path,
)

__all__ = ["expect", "fast_config", "number_judge", "pairs_of", "tree_path"]
