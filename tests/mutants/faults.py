"""Twelve faults that an audit planted all at once without a test noticing, one by one."""

from __future__ import annotations

import dataclasses
import hashlib

from tests.mutants.sites import NAMED, PACKAGE, ROOT


@dataclasses.dataclass(frozen=True)
class Fault:
    """One named fault: `old`, which stands once in the file, becomes `new`."""

    title: str
    file: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """In the file of results."""
        return f"fault: {self.title}"

    @property
    def digest(self) -> str:
        """Of the file as it is."""
        return hashlib.sha256((ROOT / PACKAGE / self.file).read_bytes()).hexdigest()[:12]

    @property
    def tests(self) -> tuple[str, ...]:
        """What may notice it."""
        return NAMED

    def source(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / PACKAGE / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.old!r} in {self.file}"
        return text.replace(self.old, self.new)


FAULTS = (
    Fault(
        "no gradient clipping",
        "learner/optimizer.py",
        "optax.clip_by_global_norm(config.max_grad_norm)",
        "optax.identity()",
    ),
    Fault(
        "no weight decay",
        "learner/optimizer.py",
        "weight_decay=config.weight_decay",
        "weight_decay=0.0",
    ),
    Fault("another beta2", "learner/optimizer.py", "b2=config.beta2", "b2=0.95"),
    Fault("no warm-up", "learner/optimizer.py", "config.warmup_steps", "0"),
    Fault(
        "temperature forced to 1",
        "learner/logprobs.py",
        'temperature=1.0 if algo.name == "sft" else config.rollout.temperature',
        "temperature=1.0",
    ),
    Fault(
        "importance ratio inverted",
        "objective/loss.py",
        "difference = old - _finite(mask, jnp.asarray(rollout_logprobs))",
        "difference = _finite(mask, jnp.asarray(rollout_logprobs)) - old",
    ),
    Fault(
        "GSPO as PPO",
        "learner/logprobs.py",
        'is_named = algo.name in ("sft", "gspo")',
        'is_named = algo.name == "sft"',
    ),
    Fault(
        "Dr.GRPO's divisor without the number of sequences",
        "objective/token_weights.py",
        "norm_tokens * (num_rows if divide_norm_by_rows else 1)",
        "norm_tokens",
    ),
    Fault(
        "no overlong penalty",
        "algorithm/credit.py",
        "values + reward.overlong_penalty(lengths, limit, algo.overlong_buffer_tokens)",
        "values",
    ),
    Fault("no label noise", "algorithm/credit.py", "if config.algo.label_noise:", "if False:"),
    Fault(
        "no old log-probs with two updates",
        "algorithm/learn.py",
        "if config.needs_old_logprobs:",
        "if False:",
    ),
    Fault(
        "negative advantages deleted",
        "algorithm/credit.py",
        "(shaped, valid)\n    for p",
        "(shaped, valid).clip(min=0)\n    for p",
    ),
)
