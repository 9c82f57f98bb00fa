"""Host-side types that travel between the rooms, and the dimension legend of the whole package.

Dimensions (the same letters in annotations, comments and einsum):

    P  prompts in a batch            S  prompt length (tokens, image tokens included)
    G  group size (rollouts/prompt)  C  completion length (tokens, stop token included)
    B  rollouts, B = P * G           T  S + C
    V  vocabulary                    D  hidden width
    H  query heads                   K  key-value heads
    A  head dimension                L  layers
    I  images in a batch             N  patches of one image
    M  merged image tokens of one image (N / spatial_merge_size**2)

This module imports nothing of the package and never touches jax.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np

Metrics = dict[str, float]  # ``section/name`` -> value
JsonScalar: TypeAlias = str | int | float | bool | None
if TYPE_CHECKING:
    JsonValue: TypeAlias = JsonScalar | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
else:  # checked one level deep when it runs: an alias of itself has no name in other modules
    JsonValue = JsonScalar | Sequence | Mapping
JsonObject: TypeAlias = dict[str, JsonValue]


class Taxon(TypedDict, total=False):
    """A taxon and what is below it, as taxonomy files hold them; `name` is always there."""

    name: str
    synonyms: list[str]
    level: str
    children: list[Taxon]
    parts: dict[str, str]  # of a species of the field guide: what it is drawn of


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Category(enum.IntEnum):
    """Rungs of the specificity ladder, worst to best; comparisons follow the ladder.

    Source: SpeciaRL (arXiv 2603.03197), section on the judge's categories.
    """

    WRONG = 0
    ABSTAIN = 1
    GENERIC = 2
    LESS_SPECIFIC = 3
    SPECIFIC = 4
    MORE_SPECIFIC = 5

    @property
    def label(self) -> str:
        """Spelling used in every file: lower case, underscores (``less_specific``)."""
        return self.name.lower()

    @classmethod
    def from_label(cls, text: str) -> Category:
        """Parses ``less_specific`` or ``less specific`` in any case.

        Raises:
            ValueError: `text` is not one of the six names.
        """
        name = "_".join(text.strip().split()).upper()
        if name not in cls.__members__:
            expected = ", ".join(c.label for c in cls)
            raise ValueError(f"category {text!r}: expected one of {expected}")
        return cls[name]


class FailureKind(enum.StrEnum):
    """Why a pair has no label. A failure is never a category and never a reward."""

    TIMEOUT = "timeout"
    REFUSED = "refused"
    RATE_LIMITED = "rate_limited"
    SERVER = "server"
    UNPARSABLE = "unparsable"
    TOO_LONG = "too_long"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's label for one (ground truth, answer) pair.

    Attributes:
        category: rung of the ladder.
        judge: who decided: ``exact``, ``synonym`` or the judge model's name.
        is_cached: True if no request was made for this call (cache, cascade or in-flight twin).
    """

    category: Category
    judge: str
    is_cached: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """A pair that stayed without a label after all retries.

    Attributes:
        kind: typed reason.
        message: one line for the log: what was asked of whom and what came back.
    """

    kind: FailureKind
    message: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image of any source.

    Attributes:
        image: encoded bytes (JPEG, PNG, ...); untrusted.
        ground_truth: cleaned human label.
        dataset: source name, e.g. ``cub``, ``field_guide_birds``.
        split: ``train``, ``validation`` or ``test``.
        prompt_id: ``dataset/split/key``; unique over everything a run can load.
        image_name: file name or record key, for logs and error messages.
    """

    image: bytes
    ground_truth: str
    dataset: str
    split: str
    prompt_id: str
    image_name: str = ""


@dataclasses.dataclass
class Rollout:
    """One sampled answer and everything known about it so far.

    Attributes:
        prompt_id, dataset, ground_truth: of its example.
        sample_index: 0..G-1 within the group.
        completion_tokens: [C] int32, the stop token included when one was sampled.
        rollout_logprobs: [C] float32, the sampler's log-probs at the training temperature,
            before any truncation (top-p, top-k).
        completion: decoded text, stop token excluded.
        prediction: text inside ``<answer>`` or None if unparsable.
        is_truncated: True if the completion ended at the length limit, not at a stop token.
        policy_version: number of updates the sampling policy had seen.
        outcome: Verdict, Failure, or None (format failure, or not judged yet).
        reward, advantage: filled in by the step.
    """

    prompt_id: str
    dataset: str
    ground_truth: str
    sample_index: int
    completion_tokens: np.ndarray
    rollout_logprobs: np.ndarray
    completion: str
    prediction: str | None
    is_truncated: bool
    policy_version: int = 0
    outcome: Verdict | Failure | None = None
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def category(self) -> Category | None:
        """The label, or None for a format failure or a missing label."""
        return self.outcome.category if isinstance(self.outcome, Verdict) else None
