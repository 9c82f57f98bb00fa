"""The same recorded rollouts through our trainer and through one of torch, update by update.

A recording is made as training goes: pictures, random answers and labels come from a seed, and the
sampler's log-probs are torch's at that moment plus noise, which is what makes a sampler that is not
quite the trainer. Both sides get the same record; ours goes through the functions of a run, and an
optimiser that remembers the parameters after each of a step's updates.

How close. Both sides compute in float32 and add in another order, so losses and the norms of whole
gradients agree to a few 1e-6. Adam divides each element of the gradient by the root of its own
square: an element that is as small as its rounding error moves by up to a learning rate either way,
on either side, and stays apart from then on. Such elements are few, but nothing is left out, so
there are three distances with three limits (`Gap`): over the whole adapter they hardly count, in
the worst tensor of some hundred elements one of them is most of the distance, and the worst element
is one of them. Limits are wider for four updates a step: there a mini-batch is one group, and one
without enough labels leaves an update to momentum alone, which is the sign of the last gradient
whatever its size. Paths from different sides of a rounding error then drift apart, the faster the
larger the steps (at three times this learning rate to 6e-3 in the gradient's norm within 20 steps),
which is why the ranges of clipping are narrowed to small steps instead of taking large ones. torch
also adds 1e-6 to the norm by which it clips. Limits are about three times the largest value seen.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from speciarl_jax.algorithm import learn
from speciarl_jax.algorithm.credit import give_credit
from speciarl_jax.config.recipes import set_algorithm
from speciarl_jax.config.schema import Config
from speciarl_jax.convert.adapter import WEIGHTS_FILE, save_peft
from speciarl_jax.data.collate import collate
from speciarl_jax.data.field_guide.specimens import draw_specimens, encode_png
from speciarl_jax.devices.layout import Params
from speciarl_jax.learner.optimizer import make_optimizer
from speciarl_jax.policy.flops import Counts
from speciarl_jax.rollout.groups import Groups, Origin, RolloutBatch
from speciarl_jax.run.session import Session, initial_state, open_session
from speciarl_jax.types import Category, Failure, FailureKind, Rollout, Verdict
from tests.support.tiny_policy import small_config, states
from tests.support.torch_trainer import (
    FAILED,
    FORMAT,
    LADDER,
    Answer,
    Bite,
    Question,
    Rules,
    TorchTrainer,
)

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "gspo")
PROMPTS, GROUP = 4, 5
SAMPLER_NOISE = 0.6  # nats between sampler and trainer
JOLT = 0.05
LOSS_FLOOR = 0.01  # a loss may be 0: positive and negative advantages cancel
LABELS = (*LADDER, FORMAT, FAILED)
LABEL_ODDS = (0.25, 0.05, 0.1, 0.15, 0.2, 0.05, 0.1, 0.1)
TOLERANCE = {  # by updates of a step
    2: {"adapter": 2e-5, "tensor": 4e-5, "element": 5e-4, "loss": 1e-4, "norm": 1e-5},
    4: {"adapter": 6e-4, "tensor": 5e-3, "element": 4e-2, "loss": 1e-3, "norm": 1e-4},
}
BITES = {"clip": 0.05, "dual": 0.005, "capped": 0.02, "kl": 1e-3, "clipped_norms": 0.5}


@dataclasses.dataclass(frozen=True)
class Gap:
    """The two sides after one update.

    Attributes:
        step, update: counted from 1; update within the step.
        adapter: distance between the sides over the distance from the start, all tensors as one.
        tensor: the same of the worst tensor.
        element: largest difference of any element, in peak learning rates.
        loss, norm: relative differences of the loss and of the gradient's norm before clipping.
        bite: what the rules did in this update, by torch's count.
    """

    step: int
    update: int
    adapter: float
    tensor: float
    element: float
    loss: float
    norm: float
    bite: Bite


def trajectory_config(name: str, num_steps: int, updates_per_step: int) -> Config:
    """A recipe of an algorithm in which every rule acts on a random policy."""
    config = small_config(
        rollout__group_size=GROUP,
        rollout__temperature=0.8,
        train__num_steps=num_steps,
        train__prompts_per_step=PROMPTS,
        train__prompts_per_update=PROMPTS // updates_per_step,
        train__prompts_per_micro_batch=1,
        optim__learning_rate=1e-2,
        optim__schedule="linear",
        optim__warmup_steps=2,
        optim__weight_decay=0.1,
        optim__beta2=0.99,
        optim__max_grad_norm=0.05,
    )
    set_algorithm(config, name)
    config.algo.kl_coef = 0.05
    config.algo.importance_cap = 2.0
    # The papers' ranges are for ratios that small updates of a random policy do not reach.
    if name == "gspo":
        config.algo.clip_dual = 1.02
    else:
        config.algo.clip_eps_low = 0.03
        config.algo.clip_eps_high = 0.04 if name == "dapo" else 0.03
        config.algo.clip_dual = 1.1
    config.validate()
    return config


def rules_of(config: Config) -> Rules:
    algo, optim = config.algo, config.optim
    return Rules(
        name=algo.name,
        low=algo.clip_eps_low,
        high=algo.clip_eps_high,
        dual=algo.clip_dual,
        kl=algo.kl_coef,
        cap=algo.importance_cap,
        overlong=algo.overlong_buffer_tokens,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_completion_tokens,
        lr=optim.learning_rate,
        warmup=optim.warmup_steps,
        num_updates=config.num_updates,
        is_linear=optim.schedule == "linear",
        betas=(optim.beta1, optim.beta2),
        decay=optim.weight_decay,
        max_norm=optim.max_grad_norm,
    )


# --- recording ----------------------------------------------------------------------------------


def draw_answers(
    session: Session, step: int
) -> tuple[list[Question], list[list[np.ndarray]], list[list[str]]]:
    """Questions, random answers and labels of a step; one group has one failed label at least."""
    rng = np.random.default_rng((20, step))
    pictures = draw_specimens("bird", "train", 24, seed=step)[:PROMPTS]
    text = session.builder.template.texts[0]
    questions = [Question(encode_png(picture), text) for picture in pictures]
    allowed = np.flatnonzero(~session.vocabulary.banned)
    limit = session.config.rollout.max_completion_tokens
    tokens = [
        [rng.choice(allowed, rng.integers(1, limit + 1)).astype(np.int32) for _ in range(GROUP)]
        for _ in questions
    ]
    tokens[0][0] = rng.choice(allowed, limit).astype(np.int32)  # one fills the padded width
    labels = [[str(x) for x in rng.choice(LABELS, GROUP, p=LABEL_ODDS)] for _ in questions]
    labels[1][:2] = [FAILED, "wrong"]
    return questions, tokens, labels


def make_rollouts(
    session: Session, step: int, questions: list[Question], groups: list[list[Answer]]
) -> RolloutBatch:
    """The record as a run holds it."""
    encoded = [
        session.builder.encode_images([q.image], q.text, f"{step}/{i}")
        for i, q in enumerate(questions)
    ]
    batch = collate(
        encoded,
        session.arch,
        session.builder.limits,
        pad_id=0,
        num_prompts=PROMPTS,
        prompt_buckets=(48,),
        window_buckets=(6,),
    )
    rollouts: Groups = [
        [_rollout(f"{step}/{i}", j, answer) for j, answer in enumerate(group)]
        for i, group in enumerate(groups)
    ]
    return RolloutBatch(
        step=step,
        sampled_after=step - 1,
        batch=batch,
        image_embeds=session.encode(states(session), batch),
        groups=rollouts,
        pending=[],
        origin=Origin({}, 1, None),
        stats={},
        sampled=Counts(),
    )


def _rollout(prompt_id: str, index: int, answer: Answer) -> Rollout:
    outcome: Verdict | Failure | None = None
    if answer.label == FAILED:
        outcome = Failure(FailureKind.TIMEOUT, "recorded")
    elif answer.label != FORMAT:
        outcome = Verdict(Category.from_label(answer.label), "recorded")
    return Rollout(
        prompt_id=prompt_id,
        dataset="recorded",
        ground_truth="bird",
        sample_index=index,
        completion_tokens=answer.tokens,
        rollout_logprobs=answer.logprobs,
        completion="",
        prediction=None if answer.label == FORMAT else "bird",
        is_truncated=False,
        outcome=outcome,
    )


# --- our side -----------------------------------------------------------------------------------


def keep_history(
    optimizer: optax.GradientTransformation, size: int
) -> optax.GradientTransformation:
    """The optimiser of a run that also remembers the parameters after each of `size` updates."""

    def init(params: Params) -> tuple:
        zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(size))
        return jnp.zeros((), jnp.int32), tuple(zeros)

    def update(updates: Params, state: tuple, params: Params) -> tuple[Params, tuple]:
        count, history = state
        after = optax.apply_updates(params, updates)
        kept = tuple(
            jax.tree.map(lambda new, old, i=i: jnp.where(count % size == i, new, old), after, old)
            for i, old in enumerate(history)
        )
        return updates, (count + 1, kept)

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


def peft_tensors(
    session: Session, trainable: Params, folder: pathlib.Path
) -> dict[str, np.ndarray]:
    """The adapter under peft's names."""
    parts = dataclasses.replace(session.parts, trainable=trainable)
    save_peft(parts, session.config.lora, str(session.model_dir), folder)
    return load_file(folder / WEIGHTS_FILE)


def _jolted(session: Session) -> Session:
    """B is not zero, so that every tensor has a gradient, and policy and reference differ."""
    rng = np.random.default_rng(22)
    trainable = jax.tree.map(
        lambda x: _put(np.asarray(x) + JOLT * rng.normal(size=x.shape), like=x),
        session.parts.trainable,
    )
    return dataclasses.replace(
        session, parts=dataclasses.replace(session.parts, trainable=trainable)
    )


def _put(values: np.ndarray | jax.Array, like: jax.Array) -> jax.Array:
    """A new array where `like` lies, so that the first update is no program of its own."""
    return jax.device_put(np.array(values, np.float32), like.sharding, may_alias=False)


# --- both ---------------------------------------------------------------------------------------


def run_trajectory(config: Config) -> Iterator[Gap]:
    """Trains both sides and compares them after every update."""
    session = _jolted(open_session(config))
    size = config.updates_per_step
    optimizer = keep_history(make_optimizer(config.optim, config.num_updates), size)
    state = initial_state(session, optimizer, {})
    own = jax.tree.map(lambda x: _put(x, like=x), state.trainable)  # updates donate it
    state = dataclasses.replace(state, trainable=own)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        start = peft_tensors(session, session.parts.trainable, folder)
        peer = TorchTrainer(session.model_dir, folder, rules_of(config))
        for step in range(1, config.train.num_steps + 1):
            questions, tokens, labels = draw_answers(session, step)
            seen = peer.look(questions, tokens)
            groups = _sampled(step, tokens, labels, seen)
            rollouts = make_rollouts(session, step, questions, groups)
            sequences = learn.pad_alike(session, rollouts)
            references = learn.start_references(session, state, sequences)
            index = rollouts.batch.global_index
            credit = give_credit(
                config, rollouts.groups, sequences.completions.lengths, index, step
            )
            update = learn.start_update(session, optimizer, state, sequences, credit, references)
            stats = jax.device_get(update.stats)
            state, _ = learn.finish_update(config, state, update)
            history = state.optim.inner[1][1]
            theirs = peer.updates(questions, groups, seen, config.train.prompts_per_update)
            for number, result in enumerate(theirs):
                ours = peft_tensors(session, history[number], folder)
                distances = _distances(ours, result.adapter, start, config.optim.learning_rate)
                loss = abs(float(stats[number]["loss"]) - result.loss)
                norm = abs(float(stats[number]["grad_norm"]) - result.norm)
                yield Gap(
                    step,
                    number + 1,
                    *distances,
                    loss=loss / max(abs(result.loss), LOSS_FLOOR),
                    norm=norm / result.norm if norm else 0.0,
                    bite=result.bite,
                )


def _sampled(step: int, tokens, labels, seen) -> list[list[Answer]]:
    """Answers with the log-probs of a sampler that is not quite the trainer."""
    rng = np.random.default_rng((21, step))
    return [
        [
            Answer(t, _off(old.numpy(), rng), label)
            for t, label, (old, _) in zip(*group, strict=True)
        ]
        for group in zip(tokens, labels, seen, strict=True)
    ]


def _off(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (old + SAMPLER_NOISE * rng.normal(size=old.shape)).astype(np.float32)


def _distances(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    start: dict[str, np.ndarray],
    learning_rate: float,
) -> tuple[float, float, float]:
    """`adapter`, `tensor` and `element` of `Gap`.

    Before anything has moved the sides have to be equal to the bit: 0 over 0 is 0, all else 1.
    """
    assert ours.keys() == theirs.keys() == start.keys()
    gaps = {name: ours[name].astype(np.float64) - theirs[name] for name in ours}
    squares = [
        (np.sum(gap**2), np.sum((theirs[name].astype(np.float64) - start[name]) ** 2))
        for name, gap in gaps.items()
    ]
    shares = [_share(*pair) for pair in squares]
    element = max(float(np.abs(gap).max()) for gap in gaps.values())
    return _share(*np.sum(squares, axis=0)), max(shares), element / learning_rate


def _share(gap: float, path: float) -> float:
    return float(np.sqrt(gap / path)) if path else float(gap > 0)


def total_bite(gaps: Sequence[Gap]) -> Bite:
    """What the rules did over all updates."""
    total = Bite()
    for gap in gaps:
        total.add(gap.bite)
    return total


def shortcomings(gaps: Sequence[Gap]) -> list[str]:
    """Updates beyond the tolerance, and rules that acted too rarely."""
    found = [
        f"step {gap.step} update {gap.update}: {key} {getattr(gap, key):.1e} beyond {limit:.0e}"
        for gap in gaps
        for key, limit in TOLERANCE[max(gap.update for gap in gaps)].items()
        if not getattr(gap, key) <= limit
    ]
    shares = total_bite(gaps).share()
    return found + [
        f"{key} {shares[key]:.4f} of the tokens or updates, at least {least} needed"
        for key, least in BITES.items()
        if not shares[key] >= least
    ]
