"""TFDS builder of the rendered field guide: draws its pictures and writes them to ArrayRecord."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib

import tensorflow_datasets as tfds

from speciarl_jax.data import field_guide
from speciarl_jax.data.field_guide.specimens import (
    HARD_CYCLE,
    WARMUP_CYCLE,
    Specimen,
    draw_specimens,
    encode_png,
)
from speciarl_jax.data.sources.builder import Examples, ImageBuilder

DOMAINS = {"birds": "bird", "flowers": "flower", "aircraft": "aircraft", "dogs": "dog"}


@dataclasses.dataclass(eq=False)
class FieldGuideConfig(tfds.core.BuilderConfig):  # type: ignore[misc]
    """Which part of the guide to draw.

    Attributes:
        num_train, num_validation, num_test: pictures per split; a split of 0 does not exist.
        hard_frac: share of pictures on which the species cannot be told.
        warmup: 1 to draw hard pictures in the warm-up's mixture.
    """

    domain: str = "birds"
    num_train: int = 2000
    num_validation: int = 240
    num_test: int = 240
    seed: int = 0
    hard_frac: float = 0.4
    warmup: int = 0

    @property
    def cycle(self) -> tuple[int, ...]:
        """Candidates of the hard pictures, in order."""
        return WARMUP_CYCLE if self.warmup else HARD_CYCLE

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each split."""
        return {
            "train": self.num_train,
            "validation": self.num_validation,
            "test": self.num_test,
        }

    def draw(self, split: str) -> list[Specimen]:
        """The specimens of a split, in order."""
        count = self.counts[split]
        return draw_specimens(
            DOMAINS[self.domain], split, count, self.seed, self.hard_frac, self.cycle
        )

    @classmethod
    def make(cls, domain: str, **options: float) -> FieldGuideConfig:
        """Config of a domain; its name holds the options and the version of the drawing code.

        Raises:
            ValueError: unknown domain or option.
        """
        if domain not in DOMAINS:
            raise ValueError(f"field guide domain {domain!r}: expected one of {', '.join(DOMAINS)}")
        num_train = 2000 if domain == "birds" else 0
        defaults = {"train": num_train, "validation": 240, "test": 240, "seed": 0, "hard_frac": 0.4}
        defaults["warmup"] = 0
        unknown = set(options) - set(defaults)
        if unknown:
            raise ValueError(
                f"field guide option {min(unknown)!r}: expected one of {', '.join(defaults)}"
            )
        values = defaults | options
        suffix = "".join(f"-{key}{values[key]:g}" for key in sorted(options))
        return cls(
            name=f"{domain}{suffix}-{drawing_version()}",
            domain=domain,
            num_train=int(values["train"]),
            num_validation=int(values["validation"]),
            num_test=int(values["test"]),
            seed=int(values["seed"]),
            hard_frac=float(values["hard_frac"]),
            warmup=int(values["warmup"]),
        )


@functools.cache
def drawing_version() -> str:
    """Hash of the drawing code and taxonomy: pictures of an older version are never reused."""
    folder = pathlib.Path(field_guide.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".py", ".json"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def example_name(split: str, seed: int, number: int) -> str:
    """Name of one picture: that of a seed other than 0 holds the seed."""
    return f"{split}-{seed}-{number:05d}" if seed else f"{split}-{number:05d}"


class FieldGuide(ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rendered pictures; the label is the species, ``name`` that of `example_name`."""

    BUILDER_CONFIGS = ()

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        counts = self.builder_config.counts
        return {split: self._generate_examples(split) for split, count in counts.items() if count}

    def _generate_examples(self, split: str) -> Examples:
        config = self.builder_config
        for number, specimen in enumerate(config.draw(split)):
            name = example_name(split, config.seed, number)
            label = specimen.species.name
            yield name, {"image": encode_png(specimen), "label": label, "name": name}
