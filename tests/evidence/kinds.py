"""What a run answered by how many species a picture of the field guide leaves open."""

from __future__ import annotations

import collections
import json
import pathlib

from speciarl_jax.data.field_guide.builder import FieldGuideConfig
from speciarl_jax.data.sources.catalog import parse_options
from speciarl_jax.scoring.predictions import read_predictions

STAGES = ("base", "trained", "base_sampled", "trained_sampled")


def by_candidates(workdir: pathlib.Path) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by evaluation, candidates and category, over the domains not trained on."""
    data = json.loads((workdir / "config.json").read_text())["data"]
    candidates = {}
    for spec in data["eval_sources"]:
        name, _, argument = spec.partition(":")
        if name in data["in_domain"]:
            continue
        domain = name.removeprefix("field_guide_")
        options = FieldGuideConfig.make(domain, **parse_options(name, argument))
        candidates |= {(name, number): one for number, one in enumerate(options.draw("test"))}
    found: dict[str, dict[str, dict[str, int]]] = {}
    for stage in STAGES:
        file = workdir / "eval" / stage / "predictions.jsonl"
        if not file.is_file():
            continue
        counts: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for row in read_predictions(file):
            specimen = candidates.get((row.dataset, int(row.prompt_id.rsplit("-", 1)[1])))
            if specimen is None:
                continue
            assert specimen.species.name == row.ground_truth, row.prompt_id
            label = row.category.label if row.category is not None else "none"
            counts[specimen.candidates][label] += 1
        found[stage] = {str(key): dict(sorted(counts[key].items())) for key in sorted(counts)}
    return found
