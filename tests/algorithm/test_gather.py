"""Dynamic sampling: which groups are kept, how batches are joined, where it stops, resuming."""

import concurrent.futures

import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.algorithm import credit
from speciarl_jax.algorithm.gather import gather_rollouts
from speciarl_jax.arch import Arch
from speciarl_jax.config import recipes
from speciarl_jax.config.schema import Config
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.data.collate import collate
from speciarl_jax.data.field_guide.specimens import draw_specimens, encode_png
from speciarl_jax.data.recipe import make_builder
from speciarl_jax.errors import TrainingStopped
from speciarl_jax.learner import batches
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from speciarl_jax.objective.reward import FORMAT_FAILURE, UNLABELLED
from speciarl_jax.run import opening
from speciarl_jax.run.session import load_tokenizer
from speciarl_jax.run.state import TrainState
from speciarl_jax.timing import Clock
from speciarl_jax.types import Category, Failure, FailureKind, Verdict
from tests.support.tiny_policy import open_small_session
from tests.support.training import run_stopped_and_resumed, small_config


def test_groups_with_a_lesson_by_hand():
    """Raw rewards decide: equal ones teach nothing, and a group below the quorum is not kept."""
    codes = np.array(
        [
            [4, 2, 0, 0],  # 1 0 0 0
            [4, 5, 4, 4],  # all reach the bar
            [0, 0, 0, 0],  # none does
            [4, 4, 4, FORMAT_FAILURE],  # 1 1 1 -1
            [4, 0, UNLABELLED, UNLABELLED],  # floor(.25 * 4) = 1 label may be missing
            [4, 0, 4, UNLABELLED],
            [4, 4, 4, UNLABELLED],
        ]
    )
    config = Config()
    config.algo.failed_quorum_frac = 0.25
    config.algo.overlong_buffer_tokens = 8
    expected = [True, False, False, True, False, True, False]
    assert credit.has_lesson(config, codes).tolist() == expected


def settings(**changes):
    config = Config()
    config.train.prompts_per_step = config.train.prompts_per_update = 4
    config.train.prompts_per_micro_batch = 2
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo__generation_prompts": 8}, "only with algo.dynamic_sampling=true"),
        (
            {"algo__dynamic_sampling": True, "algo__max_generation_batches": 0},
            "=0: set it to at least 1",
        ),
        (
            {
                "algo__dynamic_sampling": True,
                "algo__generation_prompts": 1,
                "algo__max_generation_batches": 3,
            },
            "cannot fill train.prompts_per_step=4",
        ),
        ({"algo__dynamic_sampling": True, "algo__name": "sft"}, "samples nothing"),
        ({"train__async_steps": 1}, "need a correction"),
        ({"train__async_steps": 2, "algo__importance_cap": 2.0}, "set 0 or 1"),
        ({"algo__importance_cap": 2.0, "algo__old_logprobs": "rollout"}, "applied twice"),
        ({"train__micro_batch_tokens": 100}, "one group takes up to 22528"),
    ],
)
def test_impossible_settings_say_what_to_set(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes).validate()


def test_recipe_has_the_papers_numbers():
    config = Config()
    recipes.set_algorithm(config, "dapo_dynamic")
    assert config.algo.name == "dapo"
    assert config.algo.dynamic_sampling
    assert (config.algo.generation_prompts, config.train.prompts_per_step) == (768, 256)
    assert config.algo.max_generation_batches == 10


@pytest.fixture(scope="module")
def session():
    return open_small_session(
        model__path="tiny", rollout__max_completion_tokens=40, rollout__chunk_tokens=40
    )


@pytest.fixture(scope="module")
def builder():
    model_dir = shipped_tiny_dir()
    config = small_config().data
    return make_builder(config, load_tokenizer(model_dir), Arch.from_dir(model_dir), model_dir, 0)


def collated(builder, first, count, bucket, windows):
    pictures = [encode_png(s) for s in draw_specimens("bird", "test", 24)[first : first + count]]
    encoded = [builder.encode_images([p], name=f"bird/{i}") for i, p in enumerate(pictures)]
    return collate(
        encoded,
        builder.arch,
        builder.limits,
        pad_id=0,
        prompt_buckets=(bucket,),
        window_buckets=(windows,),
        global_index=range(first, first + count),
    )


def test_batches_of_different_shapes_are_joined_exactly(builder):
    """Every prompt position finds the embedding, and every image the patches, it had before."""
    parts = []
    for first, count, bucket, windows in ((0, 3, 64, 6), (3, 2, 48, 9)):
        batch = collated(builder, first, count, bucket, windows)
        merged = batch.vision.mask.size // builder.arch.vision.merge_unit
        table = np.random.default_rng(first).normal(size=(merged, 5)).astype("f4")
        parts.append((batch, jnp.asarray(table)))
    rows = np.array([1, 2, 4])
    joined, table = batches.join_batches(parts, rows, builder.arch.vision.merge_unit, pad_id=7)
    assert joined.tokens.shape == (3, 64)
    assert joined.global_index.tolist() == [1, 2, 4]
    for new, (part, old) in enumerate([(0, 1), (0, 2), (1, 1)]):
        batch, embeds = parts[part]
        length = batch.prompt_lengths[old]
        assert joined.prompt_lengths[new] == length
        assert (joined.tokens[new, :length] == batch.tokens[old, :length]).all()
        assert (joined.positions[new, :, :length] == batch.positions[old, :, :length]).all()
        is_image = batch.image_rows[old] >= 0
        assert is_image.any()
        np.testing.assert_array_equal(
            np.asarray(table)[joined.table_rows(len(table))[new][joined.image_rows[new] >= 0]],
            embeds[batch.table_rows(len(embeds))[old][is_image]],
        )
        before, after = batch.vision, joined.vision
        np.testing.assert_array_equal(
            after.patches[new][after.mask[new]], before.patches[old][before.mask[old]]
        )
        np.testing.assert_array_equal(
            after.positions[new][after.mask[new]], before.positions[old][before.mask[old]]
        )
    assert joined.table_rows(len(table)).max() < len(table)
    assert joined.image_rows.max() < len(table) // 3


class ScriptedJudge:
    """Labels by the number of a call's pair, the same in every run: `verdict(number)`."""

    def __init__(self, verdict):
        self.verdict, self.count = verdict, 0

    def submit(self, pairs, step=0):
        future = concurrent.futures.Future()
        future.set_result([self.verdict(self.count + i) for i in range(len(pairs))])
        self.count += len(pairs)
        return future


def gather(session, judge, **changes):
    """Rollouts of step one for 4 prompts, 4 answers each, answered in one chunk."""
    config = small_config(algo__dynamic_sampling=True, algo__kl_coef=0.0, **changes)
    session.config = config
    loader = opening.open_train_loader(session)
    optimizer = make_optimizer(config.optim, 1)
    trainable = session.parts.trainable
    state = TrainState(trainable, init_optimizer(optimizer, trainable), 0, {})
    try:
        return gather_rollouts(session, judge, state, loader, 1, Clock()), loader.position
    finally:
        loader.close()


def verdict(category):
    return Verdict(Category(category), "scripted")


@pytest.mark.slow
def test_first_kept_groups_in_batch_order_make_the_step(session):
    """16 answers a batch in rollout order; the first two groups of each batch teach."""
    labels = [4, 0, 4, 0] * 2 + [4] * 8
    rollouts, position = gather(session, ScriptedJudge(lambda n: verdict(labels[n % 16])))
    assert rollouts.batch.global_index.tolist() == [0, 1, 4, 5]
    assert [g[0].prompt_id for g in rollouts.groups] == rollouts.batch.prompt_ids
    assert rollouts.stats["group/kept_frac"] == 0.5
    assert rollouts.stats["rollout/generation_batches"] == 2
    assert position == 8
    surplus, _ = gather(
        session, ScriptedJudge(lambda n: verdict(4 * (n % 2))), algo__generation_prompts=8
    )
    assert surplus.batch.global_index.tolist() == [0, 1, 2, 3]
    assert surplus.stats["group/kept_frac"] == 1.0


@pytest.mark.slow
def test_stops_with_numbers_and_remedies(session):
    failure = Failure(FailureKind.TIMEOUT, "scripted")
    labels = [verdict(4)] * 12 + [failure, failure, verdict(0), verdict(4)]
    judge = ScriptedJudge(lambda n: labels[n % 16])
    with pytest.raises(TrainingStopped) as error:
        gather(session, judge, algo__max_generation_batches=2)
    message = str(error.value)
    assert "2 generation batches gave 0 of 4 groups" in message
    assert "of 8, 6 had equal rewards, 2 too few labels" in message
    assert "algo.max_generation_batches=2" in message
    all_failed = ScriptedJudge(lambda n: failure)
    with pytest.raises(TrainingStopped, match="failed_budget_frac"):
        gather(session, all_failed)


@pytest.mark.slow
def test_resumes_bit_for_bit(tmp_path):
    whole, resumed = run_stopped_and_resumed(
        tmp_path,
        train__num_steps=4,
        algo__name="dapo",
        algo__kl_coef=0.0,
        algo__dynamic_sampling=True,
        algo__generation_prompts=3,
    )
    assert whole == resumed
    assert all(row["rollout/generation_batches"] >= 2 for row in whole)
    assert all(row["policy/grad_norm"] > 0 for row in whole)
