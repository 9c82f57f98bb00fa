"""The runs of `tests.drills.witness`, and what must have happened in each for it to prove anything.

Small, and nothing like training: six steps at a rate at which ratios clip, gradients are cut and
answers run into their limit, with noisy labels and the penalty on length. In a calm regime most
terms of the loss are 0 and a refactor that loses one of them changes no number.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

NUM_STEPS = 6
Row = Mapping[str, Any]


@dataclasses.dataclass
class Evidence:
    """What a finished run left.

    Attributes:
        rows: of metrics.jsonl, whole.
        evals: content of eval/<name>/metrics.json by name.
        rollouts: lines of rollouts/<step>.jsonl by file name.
        seconds: wall time.
    """

    rows: list[dict[str, Any]]
    evals: dict[str, Any]
    rollouts: dict[str, list[dict[str, Any]]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: in the table and for ``--only``.
        recipe: below configs/, with its argument.
        settings: ``--config.KEY=VALUE``.
        acts: keys of `ACTS`: what must be seen in its rows.
        differs: (another run, metric): the first row must differ there, as nothing in this run's
            own rows shows its setting at work.
        processes: that train together.
        devices: fake ones of the process.
        stop_at: step after which a first process ends and a second resumes; 0 for one process.
        num_steps: of the run.
    """

    name: str
    recipe: str
    settings: dict[str, str]
    acts: tuple[str, ...]
    differs: tuple[str, str] | None = None
    processes: int = 1
    devices: int = 1
    stop_at: int = 0
    num_steps: int = NUM_STEPS


QUIET = {
    "eval.score_base": "false",
    "eval.score_trained": "false",
    "eval.best_of": "0",
    "train.eval_every": "0",
}
COMMON = {
    **QUIET,
    "data.num_train": "40",  # a second epoch begins at step six
    "train.prompts_per_step": "8",
    "train.prompts_per_update": "4",
    "train.prompts_per_micro_batch": "2",
    "train.table_every": "1",  # rollouts of every step
    "train.save_every": "100",
    "rollout.group_size": "4",
    "rollout.max_completion_tokens": "28",  # the policy says 23 to 27 before it is led astray
    "rollout.temperature": "0.8",
    "algo.label_noise": "0.1",
    "algo.overlong_buffer_tokens": "4",
    "algo.clip_dual": "1.2",
    "optim.learning_rate": "1e-2",
    "optim.max_grad_norm": "0.02",
}
CPU = "cpu_smoke.py"
GRPO = {**COMMON, "algo.kl_coef": "0.05", "optim.schedule": "constant"}
INT8 = {**GRPO, "rollout.kv_cache_dtype": "int8", "train.mismatch_gate": "0.5"}
FULL = {**COMMON, "model.train_base": "true", "algo.kl_coef": "0", "optim.learning_rate": "1e-3"}
SFT_DATA = " + ".join(f"field_guide_{d}:train=32,test=0,seed=7" for d in ("birds", "dogs"))
ALWAYS = ("learns_something", "clips", "cuts_gradients", "noise", "overlong")

RUNS = (
    Run("grpo", CPU, GRPO, (*ALWAYS, "kl", "dual")),
    Run(
        "dr_grpo",
        f"{CPU}:algo=dr_grpo,reward=binary",
        {**COMMON, "rollout.top_p": "0.95", "rollout.top_k": "20", "seed": "1"},
        ALWAYS,
    ),
    Run(
        "dapo",
        f"{CPU}:algo=dapo,reward=scale1",
        {**COMMON, "algo.entropy_coef": "0.01", "optim.schedule": "cosine"},
        (*ALWAYS, "entropy"),
    ),
    Run(
        "gspo",
        CPU,
        {
            **COMMON,
            "algo.name": "gspo",
            "algo.kl_coef": "0",
            "algo.aggregation": "seq-mean-token-mean",
            "algo.clip_eps_low": "3e-4",
            "algo.clip_eps_high": "4e-4",
            "algo.clip_dual": "0",
            "rollout.min_p": "0.001",
            "rollout.repetition_penalty": "1.02",
        },
        ALWAYS,
    ),
    Run(
        "rloo",
        f"{CPU}:reward=binary",
        {
            **COMMON,
            "algo.name": "rloo",
            "algo.aggregation": "seq-mean-token-sum",
            "rollout.compact": "true",
            "rollout.chunk_tokens": "4",
            "rollout.stop_strings": "('</answer>',)",
            "optim.max_grad_norm": "0.2",
        },
        (*ALWAYS, "kl"),
    ),
    Run(
        "sft",
        "tiny_sft.py",
        {
            **QUIET,
            "data.source": SFT_DATA,
            "train.prompts_per_step": "8",
            "train.prompts_per_update": "4",
            "train.prompts_per_micro_batch": "2",
            "train.save_every": "100",
            "optim.learning_rate": "5e-4",
            "optim.warmup_steps": "2",
            "optim.max_grad_norm": "0.3",
        },
        ("learns_something", "cuts_gradients"),
    ),
    Run(
        "packed",
        CPU,
        {**GRPO, "train.micro_batch_tokens": "500", "data.max_prompt_tokens": "48"},
        (*ALWAYS, "kl"),
        differs=("grpo", "throughput/padding_frac"),
    ),
    Run(
        "async",
        CPU,
        {**GRPO, "train.async_steps": "1", "algo.importance_cap": "1.05"},
        (*ALWAYS, "kl", "stale", "capped"),
    ),
    Run("int8", CPU, INT8, (*ALWAYS, "mismatch")),
    Run(
        "rollout_logprobs",
        CPU,
        {**INT8, "algo.old_logprobs": "rollout"},
        (*ALWAYS, "mismatch"),
        differs=("int8", "policy/loss"),
    ),
    Run(
        "dynamic",
        f"{CPU}:algo=dapo_dynamic,reward=binary",
        {**COMMON, "algo.generation_prompts": "4", "algo.max_generation_batches": "40"},
        ("learns_something", "clips", "cuts_gradients", "overlong", "resamples"),
    ),
    # Its rollout files hold the first process's groups, so "noise" is not to be seen there.
    Run(
        "processes",
        CPU,
        GRPO,
        ("learns_something", "clips", "cuts_gradients", "overlong", "kl", "devices"),
        processes=2,
    ),
    Run("resume", CPU, GRPO, (*ALWAYS, "kl"), stop_at=3),
    Run(
        "verl",
        CPU,
        {
            **GRPO,
            "algo.normalization": "verl",
            "algo.verl_micro_batch": "4",
            "algo.verl_ranks": "2",
        },
        (*ALWAYS, "kl"),
        differs=("grpo", "policy/loss"),
    ),
    Run("full", CPU, FULL, ALWAYS),
    Run(
        "vision",
        CPU,
        {**FULL, "model.train_vision": "true", "model.remat": "full"},
        ALWAYS,
        differs=("full", "policy/grad_norm"),
    ),
    Run(
        "bfloat16",
        f"{CPU}:algo=dr_grpo",
        {
            **COMMON,
            "model.param_dtype": "bfloat16",
            "model.compute_dtype": "bfloat16",
            "model.remat": "dots",
            "train.logprob_chunk_tokens": "64",
            "train.mismatch_gate": "0.5",
        },
        (*ALWAYS, "mismatch"),
    ),
    Run(
        "devices",
        CPU,
        {**GRPO, "mesh.data": "2", "mesh.tensor": "2"},
        (*ALWAYS, "kl", "devices"),
        devices=4,
    ),
    Run(
        "scored",
        f"{CPU}:reward=scale3",
        {
            **COMMON,
            "eval.score_base": "true",
            "eval.score_trained": "true",
            "eval.best_of": "2",
            "eval.bootstrap_samples": "50",
            "eval.max_completion_tokens": "28",
            "train.eval_every": "3",
            "data.num_eval": "4",
        },
        ("learns_something", "clips", "noise", "scores"),
    ),
)
SMOKE = tuple(
    Run(
        f"smoke{seed}", CPU, {"seed": str(seed)}, ("learns_something", "kl", "scores"), num_steps=60
    )
    for seed in (0, 1)
)


def unmet(run: Run, found: Evidence, others: Mapping[str, Evidence]) -> list[str]:
    """Why a run proves nothing; empty if what it is meant to exercise was at work.

    Args:
        run: the run.
        found: what it left.
        others: what other runs left, for `Run.differs`.
    """
    reasons = []
    if len(found.rows) < run.num_steps:
        reasons.append(f"{len(found.rows)} rows, expected at least {run.num_steps}")
    for name in run.acts:
        message, check = ACTS[name]
        if found.rows and not check(run, found):
            reasons.append(message)
    if run.differs and found.rows:
        other, metric = run.differs
        if found.rows[0][metric] == others[other].rows[0][metric]:
            reasons.append(f"{metric} of step 1 is that of {other}, so its setting did nothing")
    return reasons


def _some(metric: str, above: float = 0.0) -> Callable[[Run, Evidence], bool]:
    return lambda run, found: any((row.get(metric) or 0.0) > above for row in found.rows)


def _clips(run: Run, found: Evidence) -> bool:
    names = ("policy/clip_low_frac", "policy/clip_high_frac")
    return all(_some(name)(run, found) for name in names)


def _cuts_gradients(run: Run, found: Evidence) -> bool:
    return _some("policy/grad_norm", float(run.settings.get("optim.max_grad_norm", "1")))(
        run, found
    )


def _overlong(run: Run, found: Evidence) -> bool:
    free = int(run.settings["rollout.max_completion_tokens"])
    free -= int(run.settings["algo.overlong_buffer_tokens"])
    return any(row["rollout/tokens_min"] <= free < row["rollout/tokens_max"] for row in found.rows)


def _noise(run: Run, found: Evidence) -> bool:
    """The judge's labels, in the rollout files, are not those that were counted."""
    for row in found.rows:
        lines = found.rollouts.get(f"step_{row['step']:06d}", [])
        counts = collections.Counter(line["category"] for line in lines if line["category"])
        shares = {f"category/{name}_frac": n / len(lines) for name, n in counts.items()}
        if any(abs(row[name] - share) > 1e-9 for name, share in shares.items()):
            return True
    return False


def _devices(run: Run, found: Evidence) -> bool:
    per_chip = found.rows[0]["throughput/tokens_per_s_per_chip"]
    count = found.rows[0]["throughput/tokens_per_s"] / per_chip
    return round(count) == run.devices * run.processes


def _scores(run: Run, found: Evidence) -> bool:
    scored = {"base", "best_of", "trained"} <= set(found.evals)
    return scored and found.evals["base"] != found.evals["trained"]


def _resamples(run: Run, found: Evidence) -> bool:
    drops = any(row["group/kept_frac"] < 1 for row in found.rows)
    return drops and _some("rollout/generation_batches", 2)(run, found)


def _learns_something(run: Run, found: Evidence) -> bool:
    return all(row["policy/grad_norm"] > 0 for row in found.rows if row["step"] > 0)


# What is missing if the check says no, and the check.
ACTS: dict[str, tuple[str, Callable[[Run, Evidence], bool]]] = {
    "learns_something": ("a step without a gradient (policy/grad_norm)", _learns_something),
    "clips": ("no ratio clipped on one of the sides (policy/clip_*_frac)", _clips),
    "dual": ("the dual clip held nothing (policy/dual_frac)", _some("policy/dual_frac")),
    "cuts_gradients": ("no gradient above optim.max_grad_norm", _cuts_gradients),
    "kl": ("the policy stayed at its reference (policy/kl)", _some("policy/kl", 1e-6)),
    "entropy": ("no entropy (policy/entropy)", _some("policy/entropy")),
    "noise": ("no label moved (category/*_frac against rollouts/)", _noise),
    "overlong": ("no step with some answers penalised for length and some not", _overlong),
    "stale": ("no rollout was a step old (rollout/staleness)", _some("rollout/staleness")),
    "capped": ("no importance weight at its cap", _some("policy/importance_capped_frac")),
    "mismatch": ("sampler and trainer agree", _some("mismatch/logprob_max_abs", 1e-5)),
    "resamples": ("no group was drawn again (rollout/generation_batches)", _resamples),
    "devices": ("another number of devices (throughput/tokens_per_s_per_chip)", _devices),
    "scores": ("base and trained scores are missing, or equal", _scores),
}
