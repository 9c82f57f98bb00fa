"""What a parity run found, how it is judged, and how it reads."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Float64

from speciarl_jax.types import JsonObject

PIXEL_TOLERANCE = 1e-6  # processors work in float32 on values of about +-2.7


def max_abs_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference; infinite if shapes differ or anything is not finite."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.size:
        return 0.0
    error = float(np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64))))
    return error if np.isfinite(error) else float("inf")


def max_rel_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """``max|ours - theirs| / max|theirs|``: relative to the tensor's scale, not to each element."""
    error = max_abs_error(ours, theirs)
    scale = float(np.max(np.abs(theirs))) if theirs.size else 0.0
    return error / scale if scale > 0 else error


def kl_per_token(
    ours: Float[np.ndarray, "T V"], theirs: Float[np.ndarray, "T V"]
) -> Float64[np.ndarray, " T"]:
    """KL(theirs || ours) in nats of the next-token distributions that two logits mean."""
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    kl: np.ndarray = np.sum(np.exp(log_theirs) * (log_theirs - log_ours), axis=-1)
    return kl


def top1_agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of positions [T, V] at which both put the same token first."""
    return float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return found


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """One prompt.

    Attributes:
        name, num_images: what it is, and the images in it.
        num_tokens: prompt length, image tokens included.
        has_equal_tokens, has_equal_positions: prompt tokens and M-RoPE ids agree exactly.
        pixels_max_abs: largest difference of normalised pixels.
        max_abs, max_rel: component -> error, see `max_abs_error` and `max_rel_error`.
        kl_mean, kl_max: nats per prompt token.
        top1: share of prompt positions with the same most likely token.
        greedy_equal, greedy_total: leading greedy tokens that agree, of how many.
    """

    name: str
    num_tokens: int
    num_images: int
    has_equal_tokens: bool
    has_equal_positions: bool
    pixels_max_abs: float
    max_abs: dict[str, float] = dataclasses.field(default_factory=dict)
    max_rel: dict[str, float] = dataclasses.field(default_factory=dict)
    kl_mean: float = float("inf")
    kl_max: float = float("inf")
    top1: float = 0.0
    greedy_equal: int = 0
    greedy_total: int = 0

    def failures(self, tolerance: float) -> list[str]:
        """What is beyond tolerance, one line each; empty if nothing is."""
        found = []
        if not self.has_equal_tokens:
            found.append("prompt tokens differ")
        if not self.has_equal_positions:
            found.append("M-RoPE position ids differ")
        if not self.pixels_max_abs <= PIXEL_TOLERANCE:
            found.append(f"pixels differ by {self.pixels_max_abs:.3g} (> {PIXEL_TOLERANCE:g})")
        for component, error in self.max_rel.items():
            if not error <= tolerance:
                found.append(f"{component}: relative error {error:.3g} (> {tolerance:g})")
        if not self.kl_max <= tolerance:
            found.append(f"KL per token up to {self.kl_max:.3g} nats (> {tolerance:g})")
        if self.greedy_equal < self.greedy_total:
            found.append(f"greedy tokens part after {self.greedy_equal} of {self.greedy_total}")
        return found


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """All prompts of a run; `tolerance` bounds every component's relative error and KL."""

    checkpoint: str
    tolerance: float
    cases: tuple[CaseReport, ...]

    @property
    def failures(self) -> list[str]:
        """All failures, each with its prompt's name."""
        return [
            f"{case.name}: {failure}"
            for case in self.cases
            for failure in case.failures(self.tolerance)
        ]

    @property
    def exit_code(self) -> int:
        """0 if everything is within tolerance, else 1."""
        return 1 if self.failures else 0

    def worst(self) -> dict[str, float]:
        """Component -> largest relative error over the prompts."""
        found: dict[str, float] = {}
        for case in self.cases:
            for component, error in case.max_rel.items():
                found[component] = max(error, found.get(component, 0.0))
        return found

    def to_json(self) -> JsonObject:
        """Plain data for `--json`."""
        return {
            "checkpoint": self.checkpoint,
            "tolerance": self.tolerance,
            "passed": not self.failures,
            "failures": self.failures,
            "worst": self.worst(),
            "cases": [dataclasses.asdict(case) for case in self.cases],
        }

    def summary(self) -> str:
        """Tables for the terminal: prompts, then components, then the verdict."""
        lines = [
            f"parity of {self.checkpoint} (float32, relative tolerance {self.tolerance:g})",
            "",
            f"{'prompt':<24}{'tokens':>7}{'images':>7}{'logits abs':>12}{'KL mean':>11}"
            f"{'KL max':>11}{'top-1':>8}{'greedy':>9}",
        ]
        for case in self.cases:
            logits = next((v for k, v in case.max_abs.items() if k.endswith("logits")), np.inf)
            greedy = f"{case.greedy_equal}/{case.greedy_total}"
            lines.append(
                f"{case.name:<24.24}{case.num_tokens:>7}{case.num_images:>7}{logits:>12.2e}"
                f"{case.kl_mean:>11.2e}{case.kl_max:>11.2e}{case.top1:>8.4f}{greedy:>9}"
            )
        lines += ["", f"{'component':<24}{'max relative error':>20}"]
        lines += [f"{name:<24}{error:>20.2e}" for name, error in self.worst().items()]
        failures = self.failures
        lines += ["", "PASS" if not failures else f"FAIL, {len(failures)} beyond tolerance:"]
        return "\n".join(lines + [f"  {failure}" for failure in failures])
