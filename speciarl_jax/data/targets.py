"""What the answer to an example should be, for supervised steps.

Two targets are built in; a dotted path names a user's own
``function(example_key, ground_truth, question, rng) -> completion text``.
"""

from __future__ import annotations

import numpy as np

from speciarl_jax.config.dotted import import_function
from speciarl_jax.data.field_guide.targets import TargetFn, field_guide_target


def answer_only(key: str, ground_truth: str, question: str, rng: np.random.Generator) -> str:
    """``<answer>label</answer>``: the SFT baseline without reasoning."""
    return f"<answer>{ground_truth}</answer>"


def resolve_target(name: str, source: str) -> TargetFn:
    """The target function that a recipe names.

    Raises:
        ValueError: unknown name, or a dotted path that cannot be imported.
    """
    if name == "answer":
        return answer_only
    if name == "field_guide":
        return field_guide_target(source)
    if "." in name:
        return import_function(name, "target")
    raise ValueError(
        f"train.sft_target={name!r}: expected answer, field_guide or a dotted path to a function"
    )
