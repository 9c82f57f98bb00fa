"""The warm-up's answers to pictures of the field guide."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from speciarl_jax.data.field_guide.answers import answer_text, sample_level
from speciarl_jax.data.field_guide.specimens import Specimen
from speciarl_jax.data.sources.selection import parse_mixture

# (example key, ground truth, question, rng) -> completion
TargetFn = Callable[[str, str, str, np.random.Generator], str]

# Shares of answer levels in the warm-up, by question. The plain question is answered cautiously,
# so that the policy knows more than it says, and where the species cannot be told, half of the
# answers do not try; asked for the exact name, it always gives one and guesses if it must.
_PLAIN_SHARES = {"generic": 0.60, "genus": 0.25, "species": 0.15}
_EXACT_SHARES = {"generic": 0.0, "genus": 0.0, "species": 1.0}
_PLAIN_HONEST_FRAC, _EXACT_HONEST_FRAC = 0.5, 0.0


def field_guide_target(source: str) -> TargetFn:
    """The warm-up's target: visible parts, a level word, an answer at that level.

    Args:
        source: the recipe's ``data.source``; its options say how the specimens were drawn.
    """

    def target(key: str, ground_truth: str, question: str, rng: np.random.Generator) -> str:
        specimen = _specimens(source)[key]
        shares, honest_frac = _PLAIN_SHARES, _PLAIN_HONEST_FRAC
        if "exact" in question:
            shares, honest_frac = _EXACT_SHARES, _EXACT_HONEST_FRAC
        return answer_text(specimen, sample_level(specimen, rng, shares, honest_frac))

    return target


@functools.cache
def _specimens(source: str) -> dict[str, Specimen]:
    """Specimen of every prompt id of a mixture of field guide sources, training split."""
    from speciarl_jax.data.field_guide.builder import FieldGuideConfig, example_name
    from speciarl_jax.data.sources.catalog import parse_options

    found = {}
    for _, spec in parse_mixture(source):
        name, _, argument = spec.partition(":")
        domain = name.removeprefix("field_guide_")
        options = FieldGuideConfig.make(domain, **parse_options(name, argument))
        for number, specimen in enumerate(options.draw("train")):
            found[f"{name}/train/{example_name('train', options.seed, number)}"] = specimen
    return found
