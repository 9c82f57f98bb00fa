"""One process of a job that samples together: runs scenarios in order, prints one JSON line.

python -m tests.support.job_worker PORT COUNT INDEX FSDP TENSOR SCENARIO [SCENARIO ...]
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import sys
import tempfile

import numpy as np

from speciarl_jax.data.batch import PromptBatch
from speciarl_jax.devices import processes
from speciarl_jax.errors import JudgeError, RunEnded
from speciarl_jax.judge.base import Pair
from speciarl_jax.learner.batches import join_batches
from speciarl_jax.policy.vocabulary import Vocabulary
from speciarl_jax.rollout import memory
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.groups import await_verdicts, collect_groups
from speciarl_jax.rollout.sampling import Sampling
from speciarl_jax.rollout.warm_up import BatchShapes, warm_up
from speciarl_jax.run.leaving import make_poll
from speciarl_jax.run.opening import open_train_loader
from speciarl_jax.run.preemption import StepAbandoned, StopFlag
from speciarl_jax.run.session import Session, open_session
from speciarl_jax.run.storage import RunDir
from speciarl_jax.types import Category, Verdict
from tests.support.tiny_policy import small_config

PROMPTS, GROUP, SAMPLING = 4, 2, Sampling()


def open_job(data, fsdp, tensor, scope="job"):
    config = small_config(model__path="tiny", rollout__compact=True, rollout__scope=scope)
    config.rollout.chunk_tokens = 8
    config.rollout.group_size, config.rollout.max_completion_tokens = GROUP, 24
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    config.train.prompts_per_step = config.train.prompts_per_update = PROMPTS
    session = open_session(config)
    own = session.vocabulary
    # Answers of many lengths: one token in twelve ends them.
    stops = np.flatnonzero(~session.vocabulary.banned)[::12].astype(np.int32)
    own = dataclasses.replace(own, stop_ids=np.resize(own.stop_ids, len(stops)))
    session.engine.vocabulary = dataclasses.replace(session.vocabulary, stop_ids=stops)
    return dataclasses.replace(session, vocabulary=session.engine.vocabulary), own


@dataclasses.dataclass
class Job:
    """One session, the batch that every scenario starts from, and the model's own stops."""

    session: Session
    batch: PromptBatch
    vocabulary: Vocabulary

    def sample(self, batch=None, poll=None, spoil=None, group_size=GROUP, stops=None, **changes):
        """Answers of this process by (place in the data, sample), and the work they took."""
        session = self.session
        config = dataclasses.replace(session.config.rollout, **changes)
        parts, mesh = session.parts, session.sampling_mesh
        engine = RolloutEngine(parts.graphdef, config, stops or session.vocabulary, mesh)
        batch = session.pad_alike(self.batch if batch is None else batch)
        states = session.sampling_states(parts.trainable)
        embeds = session.encode(states, batch)
        answers = {}
        if spoil is not None:
            embeds = embeds * spoil
        options = {"group_size": group_size, "sampling": SAMPLING, "seed": 1, "step": 3}
        for rows in engine.generate(states, batch, embeds, poll=poll, **options):
            for row in rows:
                name = f"{int(batch.global_index[row.prompt])}/{row.sample}"
                assert name not in answers
                answers[name] = row.completion_tokens.tolist()
        return {
            "answers": answers,
            "shape": list(batch.tokens.shape[1:]),
            "steps": engine.stats.decode_steps,
            "slots": engine.stats.slot_steps,
            "waves": engine.stats.waves,
            "parked": engine.stats.parked,
            "recompilations": engine.stats.recompilations,
        }


def real_below(batch, limit):
    """The same batch, prompts from place `limit` on padding."""
    return dataclasses.replace(batch, is_real=batch.global_index < limit)


def plain(job):
    return job.sample()


def buckets(job):
    """The first process comes with longer prompts than the others."""
    wider = (64, 1, job.batch.vision.mask.shape[1]) if processes.share_index() == 0 else (0, 0, 0)
    rows, unit = np.arange(job.batch.num_prompts), job.session.arch.vision.merge_unit
    batch, _ = join_batches([(job.batch, None)], rows, unit, 0, wider)
    return job.sample(batch)


def padding(job):
    """All prompts but those of the first process are padding."""
    return job.sample(real_below(job.batch, PROMPTS // 2))


def waves(job):
    """Two waves; the second is padding in all processes but the first."""
    whole = real_below(job.batch, PROMPTS // 2 + 1)
    return job.sample(whole, max_cache_mb=0.4)  # MiB: enough for one prompt of a host


def spill(job):
    """Answers are expected to be short and are not; one host has twice the rows of the other."""
    batch, options = real_below(job.batch, 3), {"group_size": 16, "stops": job.vocabulary}
    expected = memory.MEDIAN_TOKENS, memory.P95_TOKENS
    memory.MEDIAN_TOKENS, memory.P95_TOKENS = 2, 8
    found = job.sample(batch, max_cache_mb=1.4, **options)  # MiB: for 14 rows at their longest
    memory.MEDIAN_TOKENS, memory.P95_TOKENS = expected
    return found | {"whole": job.sample(batch, **options)}


def early(job):
    """Answers of all processes but the first end with their first token."""
    stops = ("",) if processes.share_index() else ()
    return job.sample(stop_strings=stops)


def stop(job):
    """One process is asked to stop at its third look."""
    flag, looks = StopFlag(), []

    def beat():
        looks.append(0)
        flag.is_set = len(looks) >= 3 and processes.share_index() == processes.num_shares() - 1

    with tempfile.TemporaryDirectory() as folder:
        poll = make_poll(job.session, RunDir(pathlib.Path(folder)), flag, beat)
        try:
            job.sample(poll=poll)
        except StepAbandoned:
            return {"looks": len(looks), "own": flag.is_set}
    return {"looks": -1}


def sick(job):
    """The last process's images are not numbers."""
    spoil = np.ones((job.session.engine.placement.num_shards, 1), np.float32)
    spoil[-1] = np.nan
    embeds = PROMPTS * job.batch.vision.mask.shape[1] // job.session.arch.vision.merge_unit
    spoil = np.repeat(spoil, embeds // len(spoil), axis=0)
    try:
        job.sample(spoil=spoil)
    except RunEnded as error:
        return {"error": str(error), "kind": type(error).__name__, "is_shared": error.is_shared}
    return {"error": ""}


class Labels:
    """A judge that calls everything generic, or gives up."""

    def __init__(self, error=None):
        self.error, self.asked = error, 0

    def submit(self, pairs: list[Pair], step: int = 0):
        self.asked += len(pairs)
        future = concurrent.futures.Future()
        if self.error is None:
            future.set_result([Verdict(Category.GENERIC, "test") for _ in pairs])
        else:
            future.set_exception(self.error)
        return future


def collect(job, labels):
    session, vocabulary = job.session, job.vocabulary
    engine = RolloutEngine(
        session.parts.graphdef, session.config.rollout, vocabulary, session.sampling_mesh
    )
    states = session.sampling_states(session.parts.trainable)
    batch = session.pad_alike(job.batch)
    options = {"group_size": GROUP, "sampling": SAMPLING, "seed": 1, "step": 3}
    rows = engine.generate(states, batch, session.encode(states, batch), **options)
    groups, pending = collect_groups(
        rows, batch, GROUP, vocabulary, labels, step=1, policy_version=0
    )
    await_verdicts(pending, session.agree)
    return [r for group in groups for r in group if r.prediction is not None]


def judge(job):
    """The judge of one process gives up; before that all labels arrive everywhere."""
    labels = Labels()
    answered = collect(job, labels)
    good = all(r.category == Category.GENERIC for r in answered)
    is_last = processes.share_index() == processes.num_shares() - 1
    error = JudgeError("nobody answers") if is_last and processes.speaks() else None
    try:
        collect(job, Labels(error))
    except JudgeError as error:
        return {"error": str(error), "asked": labels.asked, "answered": len(answered), "good": good}
    return {"error": ""}


def warm(job):
    """Everything is compiled before the first answer; groups of one, for there are few sizes."""
    session = job.session
    shapes = BatchShapes(job.batch.num_prompts, 1, (48,), (6,))
    states = session.sampling_states(session.parts.trainable)
    arguments = (session.engine, states, session.encode, session.arch.vision, shapes)
    first = warm_up(*arguments, sampling=SAMPLING, seed=1)
    again = warm_up(*arguments, sampling=SAMPLING, seed=1)
    return {"first": first, "again": again, **job.sample(group_size=1)}


SCENARIOS = [plain, buckets, padding, waves, spill, early, stop, sick, judge, warm]

if __name__ == "__main__":
    port, count, index, fsdp, tensor = (int(x) for x in sys.argv[1:6])
    if count > 1:
        processes.connect(f"127.0.0.1:{port}", count, index)
    session, vocabulary = open_job(-1, fsdp, tensor)
    loader = open_train_loader(session)
    job = Job(session, next(loader), vocabulary)
    loader.close()
    by_name = {scenario.__name__: scenario for scenario in SCENARIOS}
    found = {name: by_name[name](job) for name in sys.argv[6:]}
    print("RESULT " + json.dumps(found), flush=True)
