"""Text metrics of open-world classification that need no judge: a second opinion on a run.

    text inclusion        the ground truth occurs in the answer, word for word (or as a synonym)
    semantic similarity   cosine of the embeddings of truth and answer
    concept similarity    highest cosine of the truth and any run of 1 to 3 words of the answer

Similarities need word vectors, which are not shipped: a folder with ``words.txt`` (one word per
line) and ``vectors.npy`` ([words, width], float), e.g. made by `convert_text_vectors` from a GloVe
or word2vec text file. A text's embedding is the mean of its words' unit vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from speciarl_jax import bootstrap
from speciarl_jax.judge.parse import normalize
from speciarl_jax.predictions import Prediction

_CONCEPT_WORDS = 3


def text_inclusion(ground_truth: str, answer: str, synonyms: Iterable[str] = ()) -> bool:
    """True if the truth (or a synonym) stands in the answer as whole words, case aside.

    Source: text inclusion of Conti et al., "On Large Multimodal Models as Open-World Image
    Classifiers" (2025); whole words instead of characters, so that "ant" is not in "plant".
    """
    padded = f" {normalize(answer)} "
    names = (normalize(name) for name in (ground_truth, *synonyms))
    return any(name and f" {name} " in padded for name in names)


@dataclasses.dataclass(frozen=True)
class WordVectors:
    """Unit word vectors.

    Attributes:
        rows: row of each word.
        vectors: [words, width] float32, of length 1.
    """

    rows: dict[str, int]
    vectors: np.ndarray

    def embed(self, text: str) -> np.ndarray | None:
        """[width] unit mean of the words' vectors; None if no word is known."""
        return self._mean([self.rows[w] for w in normalize(text).split() if w in self.rows])

    def _mean(self, rows: Sequence[int]) -> np.ndarray | None:
        if not rows:
            return None
        mean = self.vectors[list(rows)].mean(0)
        length = float(np.linalg.norm(mean))
        return None if length < 1e-6 else np.asarray(mean / length)

    def semantic_similarity(self, ground_truth: str, answer: str) -> float | None:
        """Cosine of both embeddings; None if one of them has no known word."""
        truth, said = self.embed(ground_truth), self.embed(answer)
        return None if truth is None or said is None else float(truth @ said)

    def concept_similarity(self, ground_truth: str, answer: str) -> float | None:
        """Highest cosine of the truth and 1 to 3 neighbouring words of the answer.

        Source: concept similarity of Conti et al. (2025), which takes noun phrases of a parser;
        runs of words stand in for them here.
        """
        truth = self.embed(ground_truth)
        words = normalize(answer).split()
        if truth is None:
            return None
        best: float | None = None
        for size in range(1, _CONCEPT_WORDS + 1):
            for start in range(len(words) - size + 1):
                concept = self.embed(" ".join(words[start : start + size]))
                if concept is not None:
                    cosine = float(truth @ concept)
                    best = cosine if best is None else max(best, cosine)
        return best


def load_vectors(folder: str | Path) -> WordVectors:
    """Reads ``words.txt`` and ``vectors.npy``.

    Raises:
        ValueError: a file is missing or they do not fit each other.
    """
    words_path, vectors_path = Path(folder) / "words.txt", Path(folder) / "vectors.npy"
    for path in (words_path, vectors_path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected words.txt and vectors.npy")
    words = words_path.read_text(encoding="utf-8").splitlines()
    try:
        vectors = np.load(vectors_path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{vectors_path}: not a NumPy array: {error}") from None
    if vectors.ndim != 2 or len(vectors) != len(words) or vectors.dtype.kind != "f":
        raise ValueError(
            f"{vectors_path}: expected floats of shape [{len(words)}, width] for the words of "
            f"words.txt, got {vectors.dtype} {list(vectors.shape)}"
        )
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(lengths, 1e-12)
    return WordVectors({word: i for i, word in enumerate(words)}, vectors)


def convert_text_vectors(text_file: str | Path, folder: str | Path, most: int = 400_000) -> int:
    """Turns ``word v1 v2 ...`` lines (GloVe, word2vec text) into a folder for `load_vectors`.

    Args:
        text_file: UTF-8; a header line of two numbers is skipped.
        folder: made if missing.
        most: lines to take, the most frequent words come first in such files.

    Returns:
        Number of words.

    Raises:
        ValueError: a line of another width or without numbers (named as ``file:line``).
    """
    words: list[str] = []
    rows: list[np.ndarray] = []
    with Path(text_file).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue
            try:
                row = np.array(values, np.float32)
            except ValueError:
                raise ValueError(f"{text_file}:{number}: expected a word and numbers") from None
            if len(row) == 0 or (rows and len(row) != len(rows[0])):
                width = len(rows[0]) if rows else "some"
                raise ValueError(f"{text_file}:{number}: {len(row)} numbers, expected {width}")
            words.append(word)
            rows.append(row)
            if len(words) == most:
                break
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    np.save(folder / "vectors.npy", np.array(rows))
    return len(words)


def score_text(
    predictions: Sequence[Prediction],
    vectors: WordVectors | None = None,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> dict[str, bootstrap.Estimate]:
    """Mean text metrics with 95 % intervals over images; a format failure scores 0.

    Args:
        predictions: rows, of whatever data sets; images weigh by their number of rows.
        vectors: similarities are left out if None; texts without a known word score 0.
        bootstrap_samples: resamples of the images.
        seed: of the resampling.

    Returns:
        text_inclusion and, with vectors, semantic_similarity and concept_similarity.
    """
    metrics = ["text_inclusion"]
    if vectors is not None:
        metrics += ["semantic_similarity", "concept_similarity"]
    sums: dict[tuple[str, str], np.ndarray] = {}
    for p in predictions:
        row = sums.setdefault((p.dataset, p.prompt_id), np.zeros(1 + len(metrics)))
        row[0] += 1
        if p.prediction is None:
            continue
        row[1] += text_inclusion(p.ground_truth, p.prediction)
        if vectors is not None:
            row[2] += vectors.semantic_similarity(p.ground_truth, p.prediction) or 0.0
            row[3] += vectors.concept_similarity(p.ground_truth, p.prediction) or 0.0
    moments = np.array(list(sums.values())).reshape(-1, 1 + len(metrics))
    rng = bootstrap.stratum_rng(seed, "text")
    resampled = bootstrap.resample_sums(moments, bootstrap_samples, rng)
    total = moments.sum(0)
    count = total[0] if total[0] else np.nan
    return {
        name: bootstrap.estimate(
            float(total[i] / count), resampled[:, i] / np.maximum(resampled[:, 0], 1), len(moments)
        )
        for i, name in enumerate(metrics, start=1)
    }
