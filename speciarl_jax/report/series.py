"""Reads ``metrics.jsonl``: one JSON object per step, several objects of one step are merged."""

from __future__ import annotations

import json
import math
from pathlib import Path

Series = dict[str, list[tuple[int, float]]]


def read_series(path: str | Path) -> Series:
    """Points (step, value) of every numeric metric, by name, in order of steps.

    Values that are not finite numbers are skipped. A last line cut short by a kill is ignored; the
    trainer removes it on resume. A later row of the same step and metric replaces the earlier.

    Raises:
        ValueError: no such file, or a bad line (named as ``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such metrics file; is this a run directory?")
    merged: dict[int, dict[str, float]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step, values = _parse(line)
        except ValueError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}:{number}: {error}") from None
        merged.setdefault(step, {}).update(values)
    series: Series = {}
    for step in sorted(merged):
        for name, value in merged[step].items():
            series.setdefault(name, []).append((step, value))
    return series


def _parse(line: bytes) -> tuple[int, dict[str, float]]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("expected a JSON object with an integer 'step'")
    values = {
        name: float(value)
        for name, value in row.items()
        if name != "step"
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
    return row["step"], values
