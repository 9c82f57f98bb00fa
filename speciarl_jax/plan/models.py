"""Architectures by hub id, so that a plan needs neither weights nor a network."""

from __future__ import annotations

import pathlib

from speciarl_jax.arch import Arch
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.files import read_json

# Fields of the published config.json files that `Arch.from_hf` reads.
_PUBLISHED = pathlib.Path(__file__).with_name("models.json")


def planned_arch(path: str) -> Arch:
    """The architecture of ``model.path``: ``tiny``, a local directory, or a published hub id.

    Raises:
        ValueError: neither a directory nor one of the models in ``models.json``.
    """
    if path == "tiny":
        return Arch.from_dir(shipped_tiny_dir())
    if pathlib.Path(path).is_dir():
        return Arch.from_dir(path)
    published = read_json(_PUBLISHED, "install the package again")
    if path not in published:
        raise ValueError(
            f"model.path={path!r}: a plan needs the shapes only; give a directory with config.json "
            f"or one of {', '.join(published)}"
        )
    return Arch.from_hf(published[path])
