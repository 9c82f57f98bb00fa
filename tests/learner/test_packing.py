"""Token-budget micro-batches: every group once, within the budget, balanced, the same loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.learner import batches, packing, update
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from tests.support.groups import make_batch, settings
from tests.support.tiny_policy import jolt, open_small_session


def skewed(num_prompts=64, group=10, seed=0):
    """Log-normal completion lengths with a long tail, median 150 tokens."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.lognormal(np.log(150), 0.5, (num_prompts, group)), 2048).astype(int)


def test_buckets_by_hand():
    sizes = [batches.bucket_tokens(n, 200) for n in (0, 1, 16, 17, 33, 49, 65, 81, 113, 145, 200)]
    assert sizes == [16, 16, 16, 32, 48, 64, 80, 112, 144, 192, 200]


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_every_group_once_and_within_the_budget(num_replicas):
    lengths = skewed()
    packs = packing.pack_groups(lengths[None], 400, 2048, 16_384, num_replicas)[0]
    rows = np.concatenate([pack.rows for pack in packs])
    assert sorted(rows[rows >= 0]) == list(range(64))
    for pack in packs:
        assert len(pack.rows) % num_replicas == 0
        assert pack.padded_tokens(10) <= 16_384 * num_replicas
        assert lengths[pack.rows[pack.rows >= 0]].max() <= pack.completion_tokens
    assert len({(len(p.rows), p.completion_tokens) for p in packs}) <= 7


def test_processes_share_shapes_and_keep_their_groups():
    """One process has all the long answers; the others run its micro-batches on what they have."""
    lengths = np.sort(skewed(48).reshape(-1)).reshape(3, 16, 10)
    parts = packing.pack_groups(lengths, 400, 2048, 16_384, 2)
    shapes = [[(len(p.rows), p.prompt_tokens, p.completion_tokens) for p in part] for part in parts]
    assert shapes[0] == shapes[1] == shapes[2]
    for process, part in enumerate(parts):
        rows = np.concatenate([pack.rows for pack in part])
        assert sorted(rows[rows >= 0]) == list(range(16))
        for pack in part:
            chosen = pack.rows[pack.rows >= 0]
            assert lengths[process][chosen].max(initial=0) <= pack.completion_tokens


def test_padding_on_skewed_lengths():
    """128 groups, prompts 100 to 400 tokens: 1.7 times fewer tokens than padded to the longest."""
    lengths = skewed(128)
    fixed = 128 * (400 + 10 * batches.bucket_tokens(int(lengths.max()), 2048))
    packs = packing.pack_groups(lengths[None], 400, 2048, 24_576)[0]
    assert fixed > 1.7 * sum(pack.padded_tokens(10) for pack in packs)


def test_replicas_get_equal_real_tokens():
    """Dealt greedily, the busiest of 4 replicas has at most 5 % more than the mean."""
    lengths = skewed()
    packs = packing.pack_groups(lengths[None], 400, 2048, 32_768, 4)[0]
    full = [pack for pack in packs if (pack.rows >= 0).all()]
    assert full
    for pack in full:
        totals = lengths.sum(axis=1)[pack.rows].reshape(4, -1).sum(axis=1)
        assert totals.max() <= 1.05 * totals.mean()


def test_a_group_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"train.micro_batch_tokens=1000: one group takes 1900"):
        packing.pack_groups(np.full((1, 1, 10), 150), 300, 160, 1000)


@pytest.fixture(scope="module")
def session():
    return jolt(open_small_session(), scale=0.15)


def ragged(session):
    """Six groups, one much longer than the others, and its packs: several shapes and a filler."""
    _, completions, train = make_batch(session, num_prompts=6)
    lengths = np.minimum(completions.lengths, np.array([16, 3, 2, 3, 2, 3])[:, None])
    is_token = np.arange(train.tree.completion_tokens.shape[2]) < lengths[..., None]
    train = dataclasses.replace(train, weights=train.weights * is_token)
    packs = [
        packing.Pack(np.array([0, -1]), 48, 16),
        packing.Pack(np.array([4, 1]), 48, 4),
        packing.Pack(np.array([5, 3]), 48, 4),
        packing.Pack(np.array([-1, 2]), 48, 4),
    ]
    return lengths, is_token, train, packs


def run(session, function, train, *packs):
    optimizer = make_optimizer(session.config.optim, 10)
    trainable = jax.tree.map(jnp.copy, session.parts.trainable)
    optim = init_optimizer(optimizer, trainable)
    start = (session.parts.graphdef, trainable, session.parts.frozen, optim, train, *packs)
    return function(*start, session.vocabulary.banned, optimizer, settings())


@pytest.mark.slow
def test_packing_changes_nothing(session):
    """Loss, statistics and norm of fixed micro-batches to 1e-6; Adam's moments to 5e-6.

    ``tokens`` and the sums over them too, so padding rows of a pack count nothing.
    """
    lengths, is_token, train, packs = ragged(session)
    fixed = run(session, update.update_step, batches.micro_batches(train, slice(None), 6))
    packed = run(session, packing.packed_update, train, packs)
    assert set(fixed[2]) == set(packed[2]) > {"tokens", *update.TOKEN_MEANS}
    assert float(packed[2]["tokens"]) == is_token.sum()
    for name in set(fixed[2]) - {"logprobs"}:
        np.testing.assert_allclose(fixed[2][name], packed[2][name], rtol=1e-6, atol=1e-7)
    before = np.asarray(fixed[2]["logprobs"]).reshape(train.tree.completion_tokens.shape)
    np.testing.assert_allclose(
        before[is_token], np.asarray(packed[2]["logprobs"])[is_token], atol=1e-5
    )
    moments = (jax.tree.leaves(result[1].inner) for result in (fixed, packed))
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * max(np.abs(a).max(), 1e-30))
    found = packing.packed_logprobs(
        session.parts.graphdef,
        (session.parts.trainable, session.parts.frozen),
        train.tree,
        packs,
        session.vocabulary.banned,
        settings(),
    )
    np.testing.assert_allclose(np.asarray(found)[is_token], before[is_token], atol=1e-5)
    assert lengths[0].max() > 4  # longer than the other packs are wide
