"""What the evaluations of a run cost: how many answers, and the time in which they are sampled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import Config
from speciarl_jax.data.sources.catalog import count_examples
from speciarl_jax.errors import NoSuchSplit
from speciarl_jax.plan.chips import Chip
from speciarl_jax.plan.decode_cost import Cost
from speciarl_jax.plan.shapes import StepShapes, rollout_shape
from speciarl_jax.plan.work import Layout, step_work
from speciarl_jax.rollout import memory

_SAMPLING = ("encode", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class ExamRound:
    """Scorings of one kind over a run.

    Attributes:
        times: how often.
        pictures: of each evaluation source.
        samples: answers per picture.
    """

    times: int
    pictures: tuple[int, ...]
    samples: int

    @property
    def answers(self) -> int:
        """Of all of them, each of which the judge may be asked about."""
        return self.times * sum(self.pictures) * self.samples


def exam_rounds(config: Config) -> list[ExamRound]:
    """The scorings of a run, as `train.main` makes them.

    Raises:
        ValueError: an evaluation source that is not known here.
    """
    train, settings, data = config.train, config.eval, config.data

    def pictures(split: str, most: int) -> tuple[int, ...]:
        counts = (count_examples(name, split, data.data_dir) for name in data.eval_sources)
        return tuple(min(count, most or count) for count in counts)

    def validation(name: str) -> int:
        try:
            count = count_examples(name, data.validation_split, data.data_dir)
        except NoSuchSplit:
            return data.num_validation  # held out of training
        return min(count, data.num_validation or count)

    def asked(times: int, of_each: tuple[int, ...]) -> Iterator[ExamRound]:
        yield ExamRound(times, of_each, settings.samples)
        if settings.policy_samples:
            yield ExamRound(times, of_each, settings.policy_samples)

    rounds: list[ExamRound] = []
    if settings.score_base or settings.score_trained or settings.best_of:
        test = pictures(data.eval_split, data.num_eval)
        rounds += asked(settings.score_base + settings.score_trained, test)
        if settings.best_of:
            rounds.append(ExamRound(1, test, settings.best_of))
    if train.eval_every:
        times = 1 + math.ceil(train.num_steps / train.eval_every)  # before step one, at the end
        rounds += asked(times, tuple(map(validation, data.eval_sources)))
    return [one for one in rounds if one.answers]


def exam_seconds(
    config: Config,
    rounds: list[ExamRound],
    arch: Arch,
    shapes: StepShapes,
    place: Layout,
    chip: Chip,
    cost: Cost | None = None,
) -> float:
    """Roofline of sampling them, batch by batch; as in `work`, a lower bound.

    Args:
        config: the recipe.
        rounds: from `exam_rounds`.
        arch: of the policy.
        shapes: of a training step.
        place: how the model lies on the devices.
        chip: one of them.
        cost: of a decode step, as of `work.step_work`.

    Raises:
        ValueError: a prompt's answers do not fit ``rollout.max_cache_mb``.
    """
    limit = config.eval.max_completion_tokens
    rollout = dataclasses.replace(config.rollout, max_completion_tokens=limit)
    config = dataclasses.replace(config, rollout=rollout)
    seconds = 0.0
    for one in rounds:
        for count in one.pictures:
            size = min(config.eval.prompts_per_batch, count)
            size += -size % shapes.num_replicas
            batch = dataclasses.replace(
                shapes,
                num_prompts=size,
                sampled_prompts=size,
                group_size=one.samples,
                completion_tokens=limit,
                wave_prompts=size // shapes.num_hosts,
            )
            wave = memory.prompts_per_wave(arch.text, rollout_shape(config, batch, place.tensor))
            batch = dataclasses.replace(batch, wave_prompts=wave)
            work = step_work(config, arch, batch, place, chip, cost)
            once = sum(work[name].seconds for name in _SAMPLING)
            seconds += one.times * math.ceil(count / size) * once
    return seconds
