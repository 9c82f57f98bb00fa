"""Packs rollouts and thumbnails into the page: an index read at once, texts read when opened.

Everything is deflated and base64-encoded, so no byte of an answer can be mistaken for markup.
Completions lie in chunks of their own; the page inflates one when a reader opens an answer in it.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from speciarl_jax.report import thumbnails
from speciarl_jax.report.load import Run
from speciarl_jax.scoring.predictions import RUNGS, Prediction
from speciarl_jax.types import JsonObject, JsonValue

_CHUNK_ROWS = 400
_LENGTHS = (20_000, 6_000, 2_500, 1_000, 400, 150)  # characters of a completion, widest first
_PREDICTION_CHARS = 400  # of a prediction in the index; the completion has all of it


@dataclasses.dataclass
class Gallery:
    """What goes into the page; the first three are base64 text."""

    index: str  # columns of all rows, see `_index`
    completions: str  # chunks, one after the other; the index knows where each begins
    images: str  # JPEGs, one after the other
    shown: int  # rows in the page
    total: int  # rows there are
    notes: list[str]  # what was shortened or left out, for the reader


_Key = tuple[str, str]


@dataclasses.dataclass
class _Group:
    """The answers of one stage to one image."""

    run: int
    stage: int
    rows: list[Prediction]

    @property
    def key(self) -> _Key:
        """What names the image, in whichever run."""
        return self.rows[0].image_key


def _find_image(runs: Sequence[Run], rows: dict[int, Prediction]) -> Path | None:
    """The image's file in the first run that has one."""
    found = (thumbnails.find_image(runs[n].path, p.image, p.prompt_id) for n, p in rows.items())
    return next(filter(None, found), None)


def _deflate(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _dump(value: JsonValue) -> bytes:
    # A lone surrogate cannot be encoded; it becomes "?" rather than an error.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def build_gallery(runs: Sequence[Run], max_rollouts: int, budget_bytes: int) -> Gallery:
    """Packs the rows of all runs within a budget.

    Where there are too many, at least a quarter is left to training (whole groups from evenly
    spaced steps), and evaluations keep the answers to the same images. Thumbnails shrink and
    completions are cut where the budget, for all three texts, asks for it.
    """
    stages, groups, total = _choose(runs, max_rollouts)
    notes = []
    shown = _rows(groups)
    if shown < total:
        notes.append(f"{shown:,} of {total:,} rollouts are in this page (--max_rollouts).")
    firsts: dict[_Key, dict[int, Prediction]] = {}
    for g in groups:
        firsts.setdefault(g.key, {}).setdefault(g.run, g.rows[0])
    keys = list(firsts)
    files = [_find_image(runs, rows) for rows in firsts.values()]
    images, spans, side = thumbnails.pack(files, int(0.6 * budget_bytes))
    missing = sum(1 for _, length in spans if not length)
    if missing:
        notes.append(f"{missing:,} of {len(keys):,} images have no thumbnail.")
    index: JsonObject = _index(runs, stages, groups, firsts)
    index["thumbs"] = [n for span in spans for n in span]
    left = budget_bytes - len(images) - len(_deflate(_dump(index)))
    completions, starts, limit = _pack_completions([r for g in groups for r in g.rows], left)
    if limit < _LENGTHS[0]:
        notes.append(f"Completions are cut after {limit:,} characters to keep the page small.")
    if files and side < thumbnails.SIDE_PX:
        notes.append(f"Thumbnails are {side} px to keep the page small.")
    index |= {"chunks": starts, "chunk_rows": _CHUNK_ROWS, "side": side}
    return Gallery(_deflate(_dump(index)), completions, images, shown, total, notes)


def _choose(
    runs: Sequence[Run], max_rollouts: int
) -> tuple[list[tuple[int, str]], list[_Group], int]:
    """Stages as (run, name), the groups that fit, and the number of rows there are."""
    stages: list[tuple[int, str]] = []
    evaluated: list[_Group] = []
    sampled: list[_Group] = []
    for number, run in enumerate(runs):
        for stage in run.stages:
            stages.append((number, stage.name))
            evaluated += _groups(number, len(stages) - 1, stage.predictions)
        if run.rollouts:
            stages.append((number, "training"))
            sampled += _groups(number, len(stages) - 1, run.rollouts)
    kept = _share(evaluated, sampled, max_rollouts)
    return stages, kept, _rows(evaluated) + _rows(sampled)


def _rows(groups: Iterable[_Group]) -> int:
    return sum(len(g.rows) for g in groups)


def _share(evaluated: list[_Group], sampled: list[_Group], most: int) -> list[_Group]:
    """Keeps at least a quarter for training, and answers given once before sampled ones."""
    left = most - min(_rows(sampled), most // 4)
    once = _fit_images([g for g in evaluated if len(g.rows) == 1], left)
    many = _fit_images([g for g in evaluated if len(g.rows) > 1], left - _rows(once))
    chosen = {id(g) for g in (*once, *many)}
    kept = [g for g in evaluated if id(g) in chosen]
    return kept + _fit_steps(sampled, most - _rows(kept))


def _fit_images(groups: list[_Group], most: int) -> list[_Group]:
    """Groups of a random choice of images, the same one for every evaluation."""
    kept, used = [], 0
    for group in sorted(groups, key=lambda g: zlib.crc32("/".join(g.key).encode())):
        used += len(group.rows)
        if used > most:
            break
        kept.append(group)
    return kept


def _groups(run: int, stage: int, rows: Iterable[Prediction]) -> list[_Group]:
    groups: dict[tuple[int | None, _Key], _Group] = {}
    for row in rows:
        groups.setdefault((row.step, row.image_key), _Group(run, stage, [])).rows.append(row)
    return list(groups.values())


def _fit_steps(groups: list[_Group], most: int) -> list[_Group]:
    """Evenly spaced groups with at most `most` rows."""
    rows = _rows(groups)
    if rows <= most:
        return groups
    kept: list[_Group] = []
    used, budget = 0, 0.0
    for group in groups:
        budget += max(most, 0) * len(group.rows) / rows
        if used + len(group.rows) <= budget:
            kept.append(group)
            used += len(group.rows)
    return kept


def _index(
    runs: Sequence[Run],
    stages: Sequence[tuple[int, str]],
    groups: Sequence[_Group],
    firsts: dict[_Key, dict[int, Prediction]],
) -> JsonObject:
    """Columns; strings are numbers into `strings`, rows of a group follow each other."""
    strings: dict[str, int] = {}

    def number(text: str | None) -> int:
        """Place of a string among the distinct ones, -1 for None."""
        return -1 if text is None else strings.setdefault(text, len(strings))

    image_number = {key: i for i, key in enumerate(firsts)}
    rows = [row for group in groups for row in group.rows]
    index: JsonObject = {
        "rungs": list(RUNGS),
        "runs": [run.name for run in runs],
        "stages": [[run, number(name)] for run, name in stages],
        "image_dataset": [number(dataset) for dataset, _ in firsts],
        "image_id": [number(prompt_id) for _, prompt_id in firsts],
        "image_truth": [number(next(iter(f.values())).ground_truth) for f in firsts.values()],
        "group_stage": [g.stage for g in groups],
        "group_image": [image_number[g.key] for g in groups],
        "group_step": [-1 if g.rows[0].step is None else g.rows[0].step for g in groups],
        "group_size": [len(g.rows) for g in groups],
        "codes": "".join(str(row.rung) for row in rows),
        "reward": [_short(row.reward) for row in rows],
        "advantage": [_short(row.advantage) for row in rows],
        "prediction": [number(_cut(row.prediction, _PREDICTION_CHARS)) for row in rows],
        "failure": [number(_cut(row.failure, _PREDICTION_CHARS)) for row in rows],
    }
    index["strings"] = list(strings)
    return index


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _cut(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else text[:most] + "…"


def _pack_completions(rows: Sequence[Prediction], budget: int) -> tuple[str, list[int], int]:
    """The chunks, where each begins (and the end), and the length at which texts were cut."""
    for limit in _LENGTHS:
        parts = [
            _deflate(_dump([_cut(r.completion, limit) for r in rows[i : i + _CHUNK_ROWS]]))
            for i in range(0, len(rows), _CHUNK_ROWS)
        ]
        if sum(map(len, parts)) <= budget or limit == _LENGTHS[-1]:
            break
    starts = list(itertools.accumulate(map(len, parts), initial=0))
    return "".join(parts), starts, limit
