"""A trainer of its own on torch: transformers' model, peft's adapter, torch's AdamW.

Written from the formulas of the papers (GRPO, Dr.GRPO, DAPO, GSPO; dual clip; truncated importance
sampling) and in the plainest way: sequences one by one and unpadded, the image through the tower
each time, rewards and advantages in float64, nothing shared with the package's own trainer.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import PeftModel
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from speciarl_jax.convert.parity.torch_reference import TorchReference

LADDER = ("wrong", "abstain", "generic", "less_specific", "specific", "more_specific")
FORMAT, FAILED = "format", "failed"  # no answer; an answer that the judge could not label


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an algorithm is, in the papers' symbols.

    Attributes:
        name: grpo, dr_grpo, dapo or gspo; says how advantages and sums are formed.
        low, high, dual: clip range below and above 1, ceiling c for A < 0.
        kl, cap: coefficient of k3, ceiling of the importance weights.
        overlong: last tokens over which DAPO's penalty grows to -1, 0 for none.
        temperature, max_tokens: of sampling.
        lr, warmup, num_updates, is_linear: peak rate and its shape, in updates.
        betas, decay, max_norm: AdamW and the bound on the gradient's norm.
    """

    name: str
    low: float
    high: float
    dual: float
    kl: float
    cap: float
    overlong: int
    temperature: float
    max_tokens: int
    lr: float
    warmup: int
    num_updates: int
    is_linear: bool
    betas: tuple[float, float]
    decay: float
    max_norm: float


@dataclasses.dataclass(frozen=True)
class Question:
    """One image and what is asked about it."""

    image: bytes
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One recorded answer: its tokens, the sampler's log-probs, and a label.

    `label` is a rung of `LADDER`, `FORMAT` or `FAILED`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    label: str


@dataclasses.dataclass
class Bite:
    """How many trained tokens each rule acted on; `add` sums, `share` divides."""

    tokens: int = 0
    clipped: int = 0
    dual: int = 0
    capped: int = 0
    kl: float = 0.0
    clipped_norms: int = 0
    updates: int = 0

    def add(self, other: Bite) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def share(self) -> dict[str, float]:
        return {
            "clip": self.clipped / max(self.tokens, 1),
            "dual": self.dual / max(self.tokens, 1),
            "capped": self.capped / max(self.tokens, 1),
            "kl": self.kl / max(self.tokens, 1),
            "clipped_norms": self.clipped_norms / max(self.updates, 1),
        }


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """The adapter after an update, by peft's names, and what was on the way."""

    adapter: dict[str, np.ndarray]
    loss: float
    norm: float
    bite: Bite


# --- rewards and advantages, float64 ------------------------------------------------------------


def rewards_of(labels: Sequence[str], lengths: Sequence[int], rules: Rules) -> list[float | None]:
    """Best-of-N reward of one group; None where there is no label, or for all if too few have one.

    method: c* is the best category of the group, at most specific and at least abstain; an answer
    that reaches it earns 1, one without an answer -1; up to a fifth of the labels may be missing.
    """
    if sum(label == FAILED for label in labels) > len(labels) // 5:
        return [None] * len(labels)
    rungs = [LADDER.index(label) for label in labels if label in LADDER]
    bar = min(max(max(rungs, default=0), LADDER.index("abstain")), LADDER.index("specific"))
    values: list[float | None] = []
    for label, length in zip(labels, lengths, strict=True):
        if label == FAILED:
            values.append(None)
            continue
        value = -1.0 if label == FORMAT else float(LADDER.index(label) >= bar)
        if rules.overlong:
            start = rules.max_tokens - rules.overlong
            value -= max(0, length - start) / rules.overlong
        values.append(value)
    return values


def advantages_of(values: Sequence[float | None], rules: Rules) -> list[float]:
    """(r - mean) / (std + 1e-6), std with n - 1; Dr.GRPO does not divide; 0 where masked."""
    known = np.array([value for value in values if value is not None], np.float64)
    if len(known) == 0 or (len(known) > 1 and np.ptp(known) == 0):
        return [0.0] * len(values)
    mean, std = (known.mean(), known.std(ddof=1)) if len(known) > 1 else (0.0, 1.0)
    divisor = 1.0 if rules.name == "dr_grpo" else std + 1e-6
    return [0.0 if value is None else (value - mean) / divisor for value in values]


# --- the loss -----------------------------------------------------------------------------------


def clipped(rho: torch.Tensor, advantage: float, rules: Rules) -> torch.Tensor:
    """max(-A rho, -A clip(rho)), held at -A c where A < 0."""
    loss = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - rules.low, 1 + rules.high))
    return loss.clamp(max=-advantage * rules.dual) if advantage < 0 and rules.dual else loss


def sequence_loss(
    policy: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor,
    sampler: torch.Tensor,
    advantage: float,
    rules: Rules,
    sizes: tuple[int, int],
) -> torch.Tensor:
    """The part of one sequence in the loss of its mini-batch.

    Args:
        policy, old, ref, sampler: [n] log-probs of its tokens.
        advantage: of the sequence.
        rules: of the algorithm.
        sizes: (sequences, tokens) of the mini-batch that take part.
    """
    num_sequences, num_tokens = sizes
    weight = (old - sampler).clamp(-20, 20).exp().clamp(max=rules.cap) if rules.cap else 1.0
    if rules.name == "gspo":  # one ratio a sequence: the geometric mean over its tokens
        ratio = (policy - old).mean().clamp(-20, 20).exp()
        term = clipped(ratio, advantage, rules) * weight
    else:
        term = clipped((policy - old).clamp(-20, 20).exp(), advantage, rules) * weight
    gap = (ref - policy).clamp(-20, 20)
    term = term + rules.kl * (gap.exp() - gap - 1).clamp(-10, 10)
    if rules.name == "gspo":
        return term.mean() / num_sequences
    if rules.name == "dr_grpo":
        return term.sum() / (num_sequences * rules.max_tokens)
    return term.sum() / num_tokens


def bite_of(policy, old, ref, sampler, advantage: float, rules: Rules) -> Bite:
    """What acted on the tokens of one sequence."""
    log_ratio = (policy - old).detach()
    if rules.name == "gspo":
        log_ratio = log_ratio.mean().expand(len(log_ratio))
    rho = log_ratio.exp()
    is_clipped = rho > 1 + rules.high if advantage > 0 else rho < 1 - rules.low
    is_dual = (rho > rules.dual) if advantage < 0 and rules.dual else torch.zeros_like(rho)
    gap = (ref - policy.detach()).clamp(-20, 20)
    return Bite(
        tokens=len(rho),
        clipped=int(is_clipped.sum()) if advantage else 0,
        dual=int(is_dual.sum()),
        capped=int(((old - sampler).exp() > rules.cap).sum()) if rules.cap else 0,
        kl=float((gap.exp() - gap - 1).clamp(max=10).sum()),
    )


# --- the trainer --------------------------------------------------------------------------------


class TorchTrainer:
    """Base model, adapter and optimiser; `look` then `updates` is one step."""

    def __init__(self, model_dir: pathlib.Path, adapter_dir: pathlib.Path, rules: Rules) -> None:
        self.rules = rules
        self.side = TorchReference(model_dir)
        config = self.side.model.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id")
        ids = [getattr(config, name) for name in (*names, "vision_end_token_id")]
        self.banned = torch.arange(config.text_config.vocab_size) >= len(self.side.tokenizer)
        self.banned[ids] = True
        with warnings.catch_warnings():  # peft asks transformers for a property that it renames
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.model = PeftModel.from_pretrained(self.side.model, adapter_dir, is_trainable=True)
        self.model.eval()
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=rules.lr, betas=rules.betas, weight_decay=rules.decay
        )
        # The first update has rate 0 where there is a warm-up, here as in optax.
        self.schedule = (
            get_linear_schedule_with_warmup(self.optimizer, rules.warmup, rules.num_updates)
            if rules.is_linear
            else get_constant_schedule_with_warmup(self.optimizer, rules.warmup)
        )

    def adapter(self) -> dict[str, np.ndarray]:
        """A copy of the adapter under the names of peft's files."""
        return {
            name.replace(".default", ""): param.detach().numpy().copy()
            for name, param in self.params.items()
        }

    def logprobs(self, question: Question, tokens: np.ndarray) -> torch.Tensor:
        """[n] log-probs of an answer's tokens at the training temperature."""
        inputs = self.side.inputs([question.image], question.text)
        own = torch.from_numpy(tokens.astype(np.int64))[None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], own], dim=1)
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(own).int()], dim=1)
        keep = len(tokens) + 1  # the last prompt token predicts the first of the answer
        logits = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits[0, :-1]
        logits = (logits / self.rules.temperature).masked_fill(self.banned, -math.inf)
        return torch.log_softmax(logits, dim=-1).gather(1, own[0][:, None])[:, 0]

    def look(
        self, questions: Sequence[Question], tokens: Sequence[Sequence[np.ndarray]]
    ) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """(old, reference) log-probs of each answer, before the updates of a step."""
        found = []
        for question, group in zip(questions, tokens, strict=True):
            with torch.no_grad():
                old = [self.logprobs(question, answer) for answer in group]
                with self.model.disable_adapter():
                    ref = [self.logprobs(question, answer) for answer in group]
            found.append(list(zip(old, ref, strict=True)))
        return found

    def updates(
        self,
        questions: Sequence[Question],
        groups: Sequence[Sequence[Answer]],
        seen: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
        prompts_per_update: int,
    ) -> Iterator[UpdateResult]:
        """The updates of one step, one mini-batch of prompts after the other."""
        for first in range(0, len(groups), prompts_per_update):
            rows = range(first, first + prompts_per_update)
            trained = []
            for row in rows:
                group = groups[row]
                lengths = [len(answer.tokens) for answer in group]
                values = rewards_of([answer.label for answer in group], lengths, self.rules)
                advantages = advantages_of(values, self.rules)
                trained += [
                    (questions[row], answer, *seen[row][i], advantages[i])
                    for i, answer in enumerate(group)
                    if values[i] is not None
                ]
            yield self._update(trained)

    def _update(self, trained: Sequence[tuple]) -> UpdateResult:
        """One mini-batch: (question, answer, old, ref, advantage) of each sequence in the loss."""
        for param in self.params.values():  # a mini-batch may be empty: its gradient is 0, not None
            param.grad = torch.zeros_like(param)
        sizes = (len(trained), sum(len(answer.tokens) for _, answer, *_ in trained))
        total, bite = 0.0, Bite(updates=1)
        for question, answer, old, ref, advantage in trained:
            policy, sampler = self.logprobs(question, answer.tokens), torch.tensor(answer.logprobs)
            loss = sequence_loss(policy, old, ref, sampler, advantage, self.rules, sizes)
            loss.backward()
            total += loss.item()
            bite.add(bite_of(policy, old, ref, sampler, advantage, self.rules))
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.rules.max_norm).item()
        bite.clipped_norms = int(norm > self.rules.max_norm)
        self.optimizer.step()
        self.schedule.step()
        return UpdateResult(self.adapter(), total, norm, bite)
