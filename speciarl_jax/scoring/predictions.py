"""Rows of ``predictions.jsonl`` and ``rollouts/step_*.jsonl``: one JSON object per rollout.

A row is in one of three states, and no row is ever dropped to hide one:

    labelled        prediction and category are both set
    format failure  prediction is null: there was no ``<answer>`` or it was empty
    judge failure   prediction is set, category is null; `failure` says why

Files are append-only, so a killed run loses at most the line it was writing. A judge failure may
be written again once it has a label: the later row replaces it when the file is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from speciarl_jax.files import write_whole
from speciarl_jax.types import Category, Failure, JsonObject, JsonValue, Rollout

# What a row may be, from worst to best; a row without a label stands last.
RUNGS = ("format_failure", *(c.label for c in Category), "judge_failure")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One sampled answer, as it stands in the files."""

    prompt_id: str  # ``dataset/split/key``
    dataset: str
    image: str  # path relative to the run directory, or "" where no file was kept
    ground_truth: str  # human label
    completion: str  # whole decoded text; untrusted
    prediction: str | None  # text inside ``<answer>``; None for a format failure
    category: Category | None  # the judge's; None for a format failure or a judge failure
    reward: float | None  # None where none was given (evaluation, masked labels)
    sample_index: int  # 0..G-1 within the image's group
    advantage: float | None = None  # training only
    step: int | None = None  # of training, None for evaluation rows
    failure: str | None = None  # why there is no label, one line

    @property
    def is_format_failure(self) -> bool:
        """True if no answer could be read from the completion."""
        return self.prediction is None

    @property
    def is_judge_failure(self) -> bool:
        """True if there is an answer and it has no label: to be judged, or judged again."""
        return self.prediction is not None and self.category is None

    @property
    def rung(self) -> int:
        """Place of the row in `RUNGS`."""
        if self.is_format_failure:
            return 0
        return len(RUNGS) - 1 if self.category is None else 1 + int(self.category)

    @property
    def image_key(self) -> tuple[str, str]:
        """(data set, prompt id): what names the image in any run."""
        return self.dataset, self.prompt_id

    @property
    def key(self) -> tuple[str, str, int, int | None]:
        """What makes a row unique in a file."""
        return (self.dataset, self.prompt_id, self.sample_index, self.step)

    def to_json(self) -> JsonObject:
        """The row as plain JSON values; `advantage`, `step`, `failure` only where they are set."""
        row: JsonObject = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        row["category"] = None if self.category is None else self.category.label
        for name in ("advantage", "step", "failure"):
            if row[name] is None:
                del row[name]
        return row


def from_rollout(rollout: Rollout, image: str = "", step: int | None = None) -> Prediction:
    """Turns a judged rollout, or a format failure, into its row.

    The reward of a rollout without a usable label is masked in training, so it is null here.
    """
    outcome = rollout.outcome
    failure = f"{outcome.kind.value}: {outcome.message}" if isinstance(outcome, Failure) else None
    return Prediction(
        prompt_id=rollout.prompt_id,
        dataset=rollout.dataset,
        image=image,
        ground_truth=rollout.ground_truth,
        completion=rollout.completion,
        prediction=rollout.prediction,
        category=rollout.category,
        reward=None if failure else float(rollout.reward),
        sample_index=rollout.sample_index,
        advantage=float(rollout.advantage),
        step=step,
        failure=failure,
    )


_REQUIRED = (
    "prediction", "category", "prompt_id", "dataset", "ground_truth", "completion", "sample_index",
)  # fmt: skip


def parse_prediction(row: JsonValue) -> Prediction:
    """Checks one decoded JSON object and turns it into a row; unknown keys are ignored.

    A blank prediction is a format failure. `image`, `reward`, `advantage`, `step` and `failure`
    may be absent.

    Raises:
        ValueError: a field is missing or of the wrong type, a number is not finite, the category
            is unknown, or a format failure carries a category.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name in _REQUIRED:
        if name not in row:
            raise ValueError(f"field {name!r} is missing")
    prediction = _text_or_none(row, "prediction")
    if prediction is not None and not prediction.strip():
        prediction = None
    label = _text_or_none(row, "category")
    if prediction is None and label is not None:
        raise ValueError(
            f"prediction is null but category is {label!r}: a format failure has no category"
        )
    return Prediction(
        prompt_id=_text(row, "prompt_id"),
        dataset=_text(row, "dataset"),
        image=_text_or_none(row, "image") or "",
        ground_truth=_text(row, "ground_truth"),
        completion=_text(row, "completion"),
        prediction=prediction,
        category=None if label is None else Category.from_label(label),
        reward=_number(row, "reward"),
        sample_index=_integer(row, "sample_index"),
        advantage=_number(row, "advantage"),
        step=None if row.get("step") is None else _integer(row, "step"),
        failure=_text_or_none(row, "failure"),
    )


def _text(row: JsonObject, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {value!r}: expected a string")
    return value


def _text_or_none(row: JsonObject, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {name!r} is {value!r}: expected a string or null")
    return value


def _number(row: JsonObject, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"field {name!r} is {value!r}: expected a finite number or null")
    if not abs(value) <= sys.float_info.max:  # nan; an int may be beyond any float
        raise ValueError(f"field {name!r} is {value!r}: expected a finite number or null")
    return float(value)


def _integer(row: JsonObject, name: str) -> int:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"field {name!r} is {value!r}: expected an integer >= 0")
    return value


def read_predictions(path: str | Path) -> list[Prediction]:
    """Reads a whole file; a judge failure that was written again is replaced in its place.

    Raises:
        ValueError: no such file, a bad line (named as ``file:line``), or a second row for the same
            rollout although the first one was no judge failure.
    """
    rows: list[Prediction] = []
    seen: dict[tuple[str, str, int, int | None], tuple[int, int]] = {}
    for number, row in _read_lines(Path(path)):
        if row.key not in seen:
            seen[row.key] = (number, len(rows))
            rows.append(row)
            continue
        first, place = seen[row.key]
        if not rows[place].is_judge_failure:
            raise ValueError(
                f"{path}:{number}: second row for {row.prompt_id!r} sample {row.sample_index} "
                f"(first in line {first}); only a row without a label may be written again"
            )
        seen[row.key] = (number, place)
        rows[place] = row
    return rows


def _read_lines(path: Path) -> Iterator[tuple[int, Prediction]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such predictions file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_prediction(json.loads(line))
            except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
                hint = ""
                if not line.endswith(b"\n"):
                    hint = "; the line was cut short by a kill: --resume removes it"
                raise ValueError(f"{path}:{number}: {error}{hint}") from None
            yield number, row


def _dump(predictions: Iterable[Prediction]) -> bytes:
    lines = [
        json.dumps(p.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for p in predictions
    ]
    return "".join(lines).encode("utf-8", errors="replace")


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes the whole file at once: afterwards there is the new file or the old one, no mixture.

    Raises:
        ValueError: a reward or advantage is not finite.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _dump(predictions))


def append_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Adds rows at the end and flushes them to disk; call `cut_half_line` once before, on resume.

    Raises:
        ValueError: a reward or advantage is not finite.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _dump(predictions)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def cut_half_line(path: str | Path) -> int:
    """Repairs the end of a file whose writer was killed, so that appending is safe again.

    A last line without a line end is removed if it is not a whole row, and completed by its line
    end if it is. A missing file is fine.

    Returns:
        Number of bytes removed.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    data = path.read_bytes()
    start = data.rfind(b"\n") + 1
    tail = data[start:]
    if not tail:
        return 0
    try:
        parse_prediction(json.loads(tail))
    except (ValueError, RecursionError):
        with path.open("r+b") as file:
            file.truncate(start)
        return len(tail)
    with path.open("ab") as file:
        file.write(b"\n")
    return 0
