"""What can go wrong at a judge, on purpose: the plan that the local server follows in tests."""

from __future__ import annotations

import dataclasses
import random

# Statuses; connections that break; replies that are none; labels that must not be believed.
FAULT_KINDS = (
    "403", "404", "429", "500", "503", "reset", "half", "hang",
    "garbage", "enum", "deep", "flood", "307", "bomb",
    "disown", "choices", "twice",
)  # fmt: skip
_NUMBERS = ("retry_after", "latency", "latency_sigma", "seed")


@dataclasses.dataclass(frozen=True)
class FaultPlan:
    """Shares of requests that fail, by kind, and the latency of all of them.

    Attributes:
        shares: kind -> share of requests in 0..1; the sum is at most 1. `429` and `503` carry
            Retry-After, `reset` closes the connection unanswered, `half` closes it in mid-body,
            `hang` never answers, `garbage` is no JSON, `enum` is a reply outside the six names,
            `deep` is nested 100,000 times, `flood` is 1 MB before the reply, `307` redirects to
            where a wrong label is given, `bomb` is gzip of 10 MB. Wrong labels come with `disown`
            (filtered, refused, an error beside them), `choices` (beside the right one) and
            `twice` (a second response on the connection, after the right one).
        retry_after: seconds in the Retry-After header.
        latency: median seconds before any answer; 0 answers at once.
        latency_sigma: spread of the log-normal latency; 0 makes it constant.
        seed: of the random choice.
    """

    shares: dict[str, float]
    retry_after: float = 1.0
    latency: float = 0.0
    latency_sigma: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Reads `429=0.1,reset=0.1,latency=0.02,latency_sigma=0.5,retry_after=0.2,seed=1`.

        Raises:
            ValueError: an unknown name, a value that is no number, or shares above 1 in total.
        """
        shares: dict[str, float] = {}
        numbers: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, value = part.partition("=")
            if name not in FAULT_KINDS and name not in _NUMBERS:
                known = ", ".join(FAULT_KINDS + _NUMBERS)
                raise ValueError(f"faults: {name!r} is unknown; expected one of {known}")
            try:
                number = float(value)
            except ValueError:
                raise ValueError(f"faults: {part!r}: expected {name}=NUMBER") from None
            (shares if name in FAULT_KINDS else numbers)[name] = number
        if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"faults: shares {shares} must be 0 or more and at most 1 in total")
        seed = int(numbers.pop("seed", 0))
        return cls(shares, seed=seed, **numbers)

    def fault(self, rng: random.Random) -> str:
        """The kind of fault for the next request, or an empty string for none."""
        draw = rng.random()
        for kind, share in self.shares.items():
            if draw < share:
                return kind
            draw -= share
        return ""

    def latency_s(self, rng: random.Random) -> float:
        """Seconds to wait before answering."""
        return self.latency and self.latency * rng.lognormvariate(0.0, self.latency_sigma)
