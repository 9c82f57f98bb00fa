"""Texts of the supervised warm-up: visible parts, a level word, and the answer at that level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from speciarl_jax.data.field_guide.specimens import Specimen

LEVELS = ("domain", "family", "genus", "species")
LEVEL_WORDS = {"domain": "broad", "family": "kind", "genus": "close", "species": "exact"}


def label_at(specimen: Specimen, level: str) -> str:
    """Returns the name of the specimen's domain, family, genus or species.

    Raises:
        ValueError: `level` is not one of `LEVELS`.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    return str(getattr(specimen.species, "name" if level == "species" else level))


def visible_parts(specimen: Specimen) -> list[str]:
    """Returns the parts that are honestly visible, in fixed order: colour, pattern, shapes."""
    colour, pattern, family_part, genus_part = (
        words if part == "pattern" else f"{words} {part}" for part, words in specimen.species.parts
    )
    if specimen.candidates == 1:
        return [colour, pattern, family_part, genus_part]
    if specimen.candidates == 2:
        return [colour, "details unclear", family_part, genus_part]
    if specimen.candidates == 3:
        seen = "plain" if pattern == "plain" else "details unclear"
        return ["colours unclear", seen, family_part, genus_part]
    if specimen.candidates == 6:
        return ["colours unclear", family_part, genus_part]
    return ["colours unclear", family_part, "details unclear"]


def answer_text(specimen: Specimen, level: str) -> str:
    """Returns one warm-up completion that names the specimen at `level`.

    The parts do not depend on the level: only the level word and the label do.
    """
    parts = ", ".join(visible_parts(specimen))
    label = label_at(specimen, level)
    return f"<think>{parts}. {LEVEL_WORDS[level]}</think><answer>{label}</answer>"


def sample_level(
    specimen: Specimen,
    rng: np.random.Generator,
    shares: Mapping[str, float],
    honest_frac: float,
) -> str:
    """Draws the level at which the warm-up names a specimen.

    Args:
        specimen: What is shown; matters only if hard.
        rng: Source of randomness.
        shares: Weights of "generic" (domain or family, evenly), "genus" and "species".
        honest_frac: Probability that a hard specimen's level is capped at its honest level.

    Raises:
        ValueError: `shares` has other keys, or no positive sum.
    """
    kinds = ("generic", "genus", "species")
    if set(shares) - set(kinds) or sum(shares.values()) <= 0:
        raise ValueError(f"shares={dict(shares)}: expected positive weights of {', '.join(kinds)}")
    weights = np.array([shares.get(kind, 0.0) for kind in kinds])
    pick = kinds[int(rng.choice(3, p=weights / weights.sum()))]
    level = LEVELS[int(rng.integers(2))] if pick == "generic" else pick
    if specimen.is_hard and rng.random() < honest_frac:
        return min(level, specimen.honest_level, key=LEVELS.index)
    return level
