"""Run directories of earlier versions: fields that are gone."""

from __future__ import annotations

from speciarl_jax.types import JsonObject

# Fields that earlier versions had, with their defaults; a recipe that left them there is the same
# recipe without them. `eval.judge` has those of `judge`.
DROPPED: dict[str, object] = {
    "data.indices": [],
    "data.train_share": 0.0,
    "data.class_balanced": False,
    "judge.retry_after_max_s": 60.0,
    "judge.prompt_price": 0.0,
    "judge.completion_price": 0.0,
    "train.keep_every_hours": 0.0,
}


def without_dropped(settings: JsonObject, place: str, section: str = "") -> JsonObject:
    """The fields of a ``config.json`` of any version but those that are gone.

    Args:
        settings: sections of fields, as the file has them; not changed.
        place: the file, for messages.
        section: where in the file `settings` stands, ending in a dot; "" for all of it.

    Raises:
        ValueError: one of them is not at its old default, so the run needs what is gone.
    """
    kept: JsonObject = {}
    for name, value in settings.items():
        field = section + name
        dropped = field.removeprefix("eval.") if field.startswith("eval.judge.") else field
        if isinstance(value, dict):
            kept[name] = without_dropped(value, place, f"{field}.")
        elif dropped not in DROPPED:
            kept[name] = value
        elif value != DROPPED[dropped]:
            raise ValueError(
                f"{place}: {field}={value!r}, but this version has no such field; use the version "
                f"that wrote it, or write {DROPPED[dropped]!r} there to go on without",
            )
    return kept
