"""The shared-prefix tree against N plain sequences; invariance to the micro-batch split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.algorithm import learn
from speciarl_jax.config.schema import AGGREGATIONS
from speciarl_jax.learner import batches, packing, update
from speciarl_jax.learner.logprobs import token_logprobs, tree_hidden
from speciarl_jax.learner.optimizer import init_optimizer, make_optimizer
from speciarl_jax.objective.token_weights import token_weights
from tests.support.groups import GROUP, make_batch, settings
from tests.support.tiny_policy import (
    full_logits,
    jolt,
    open_small_session,
    plain_sequence,
    states,
)


@pytest.fixture(scope="module")
def session():
    return jolt(open_small_session(), scale=0.15)


@pytest.mark.parametrize(
    ("field", "cut"),
    [
        ("positions", np.s_[:, :2]),
        ("image_rows", np.s_[:, 1:]),
        ("completion_tokens", np.s_[:, :, 1:]),
        ("weights", np.s_[1:]),
        ("advantages", np.s_[:, 1:]),
        ("ref_logprobs", np.s_[:, :, 1:]),
        ("images", np.s_[1:]),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(session, field, cut):
    """A ``weights`` [P, G, 1] would broadcast: the loss of one token counted for all."""
    train = make_batch(session)[2]
    holder = train.tree if hasattr(train.tree, field) else train
    holder = dataclasses.replace(holder, **{field: getattr(holder, field)[cut]})
    wrong = holder if field in vars(train) else dataclasses.replace(train, tree=holder)
    with pytest.raises(ValueError, match=r"TrainBatch\.\w+: .* expected"):
        update.check_train_batch(wrong)


def test_tree_logprobs_equal_plain_sequences(session):
    batch, completions, train = make_batch(session)
    config = settings(logprob_chunk_tokens=7)
    policy = nnx.merge(session.parts.graphdef, *states(session))
    logprobs, entropy = tree_logprobs(policy, train, session.vocabulary.banned, config)
    for p in range(4):
        for g in range(GROUP):
            length = completions.lengths[p, g]
            tokens = completions.completion_tokens[p, g, :length]
            start = int(batch.prompt_lengths[p]) - 1
            logits = full_logits(session, batch, p, tokens)[start : start + length]
            logits = np.where(session.vocabulary.banned, -np.inf, logits / 0.8)
            plain = np.asarray(jax.nn.log_softmax(logits.astype(np.float64), axis=-1))
            np.testing.assert_allclose(
                logprobs[p, g, :length], plain[np.arange(length), tokens], atol=3e-5
            )
            finite = np.where(np.isfinite(plain), plain, 0.0)
            np.testing.assert_allclose(
                entropy[p, g, :length], -(np.exp(plain) * finite).sum(-1), atol=3e-5
            )


def test_tree_gradient_equals_plain_sequences(session):
    """Gradient of sum(w * logprob) through the tree and through G separate full sequences."""
    batch, completions, train = make_batch(session, num_prompts=2)
    train = jax.tree.map(jnp.asarray, train)
    config = settings()
    banned = jnp.asarray(session.vocabulary.banned)
    frozen = session.parts.frozen
    embeds = session.encode(states(session), batch)

    def tree(trainable):
        policy = nnx.merge(session.parts.graphdef, trainable, frozen)
        hidden = tree_hidden(policy, train.tree, config)
        logprobs = token_logprobs(
            policy.text, hidden, train.tree.completion_tokens, banned, config
        )[0]
        return jnp.sum(train.weights * logprobs)

    pairs = [(p, g) for p in range(2) for g in range(GROUP)]
    answers = [completions.completion_tokens[p, g, : completions.lengths[p, g]] for p, g in pairs]
    sequences = [plain_sequence(batch, p, c) for (p, _), c in zip(pairs, answers, strict=True)]
    stacked = [jnp.asarray(np.stack(part)) for part in zip(*sequences, strict=True)]

    def plain(trainable):
        policy = nnx.merge(session.parts.graphdef, trainable, frozen)
        hidden = policy.hidden_states(*stacked, embeds)
        logits = jnp.where(banned[None, None], -1e30, policy.text.logits(hidden) / 0.8)
        logprobs = jax.nn.log_softmax(logits)
        total = 0.0
        for row, ((p, g), completion) in enumerate(zip(pairs, answers, strict=True)):
            predictors = int(batch.prompt_lengths[p]) - 1 + np.arange(len(completion))
            chosen = logprobs[row, predictors, completion]
            total = total + jnp.sum(train.weights[p, g, : len(completion)] * chosen)
        return total

    value_tree, grad_tree = jax.jit(jax.value_and_grad(tree))(session.parts.trainable)
    value_plain, grad_plain = jax.jit(jax.value_and_grad(plain))(session.parts.trainable)
    np.testing.assert_allclose(value_tree, value_plain, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad_tree), jax.tree.leaves(grad_plain), strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


@nnx.jit(static_argnames="config")
def tree_logprobs(policy, train, banned, config):
    hidden = tree_hidden(policy, train.tree, config)
    return token_logprobs(policy.text, hidden, train.tree.completion_tokens, banned, config)


def run_update(session, train, micro, config):
    optimizer = make_optimizer(session.config.optim, 10)
    trainable = jax.tree.map(jnp.copy, session.parts.trainable)
    optim = init_optimizer(optimizer, trainable)
    cut = batches.micro_batches(train, slice(None), micro)
    return update.update_step(
        session.parts.graphdef,
        trainable,
        session.parts.frozen,
        optim,
        cut,
        session.vocabulary.banned,
        optimizer,
        config,
    )


@pytest.mark.parametrize(
    "objective",
    [
        "policy",
        pytest.param("gspo", marks=pytest.mark.slow),
        pytest.param("sft", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_change_nothing(session, objective):
    _, _, train = make_batch(session)
    config = settings(objective=objective)
    whole = run_update(session, train, 4, config)
    split = run_update(session, train, 1, config)
    np.testing.assert_allclose(whole[2]["loss"], split[2]["loss"], rtol=1e-6)
    np.testing.assert_allclose(whole[2]["grad_norm"], split[2]["grad_norm"], rtol=1e-5)
    assert whole[2].keys() == split[2].keys()
    assert float(whole[2]["grad_norm"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(session, remat):
    _, _, train = make_batch(session)
    plain = run_update(session, train, 2, settings())
    again = run_update(session, train, 2, settings(remat=remat))
    np.testing.assert_allclose(plain[2]["grad_norm"], again[2]["grad_norm"], rtol=1e-5)


def test_masked_rollouts_leave_no_trace(session):
    """Tokens of weight 0 may be anything: the loss and the gradient stay the same."""
    _, completions, train = make_batch(session)
    dead = np.zeros(completions.lengths.shape, bool)
    dead[1, 2] = dead[3] = True
    weights = np.where(dead[..., None], 0, train.weights)
    first = dataclasses.replace(train, weights=weights)
    other_tokens = np.where(dead[..., None], 11, train.tree.completion_tokens)
    wild = np.where(dead, 1e6, train.advantages).astype(np.float32)
    tree = dataclasses.replace(train.tree, completion_tokens=other_tokens)
    second = dataclasses.replace(first, tree=tree, advantages=wild)
    a = run_update(session, first, 2, settings())
    b = run_update(session, second, 2, settings())
    np.testing.assert_allclose(a[2]["loss"], b[2]["loss"], rtol=1e-6)
    np.testing.assert_allclose(a[2]["grad_norm"], b[2]["grad_norm"], rtol=1e-6)


def test_non_finite_gradient_skips_the_update(session):
    _, _, train = make_batch(session)
    bad = dataclasses.replace(train, weights=train.weights * np.float32(np.nan))
    bad = dataclasses.replace(bad, weights=np.where(train.weights > 0, np.inf, 0).astype("f4"))
    trainable, optim, stats = run_update(session, bad, 4, settings())
    assert not np.isfinite(stats["grad_norm"])
    assert int(optim.num_skipped_in_row) == 1
    assert int(optim.num_updates) == 0
    for a, b in zip(
        jax.tree.leaves(trainable), jax.tree.leaves(session.parts.trainable), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def moved_once(session, packed):
    """(parameters, optimiser with momentum, a batch, its update as a function of all three)."""
    _, completions, train = make_batch(session)
    optimizer = make_optimizer(session.config.optim, 10)
    rest = (session.vocabulary.banned, optimizer, settings())

    def step(trainable, optim, batch):
        where = (session.parts.graphdef, jax.tree.map(jnp.copy, trainable), session.parts.frozen)
        optim = jax.tree.map(jnp.copy, optim)
        if not packed:
            cut = batches.micro_batches(batch, slice(None), 2)
            return update.update_step(*where, optim, cut, *rest)
        groups = completions.lengths[None]
        packs = packing.pack_groups(groups, batch.tree.prompt_tokens.shape[1], 16, 1000, 1)[0]
        return packing.packed_update(*where, optim, batch, packs, *rest)

    fresh = init_optimizer(optimizer, session.parts.trainable)
    trainable, optim, _ = step(session.parts.trainable, fresh, train)
    return trainable, optim, train, step


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_update_without_a_trained_token_moves_nothing(session, packed):
    """Momentum and weight decay of the update before would: every bit stays, counters too."""
    trainable, optim, train, step = moved_once(session, packed)
    silent = dataclasses.replace(train, weights=np.zeros_like(train.weights))
    after, optim_after, stats = step(trainable, optim, silent)
    assert float(stats["tokens"]) == 0
    before = jax.tree.leaves((trainable, optim))
    for old, new in zip(before, jax.tree.leaves((after, optim_after)), strict=True):
        np.testing.assert_array_equal(old, new)
    one = np.zeros_like(train.weights)
    one[0, 0, 0] = 1e-6
    after, optim_after, _ = step(trainable, optim, dataclasses.replace(train, weights=one))
    assert int(optim_after.num_updates) == int(optim.num_updates) + 1 == 2
    assert any(
        (old != new).any()
        for old, new in zip(jax.tree.leaves(trainable), jax.tree.leaves(after), strict=True)
    )


def test_loss_value_against_numpy(session):
    """The whole device loss against float64 numpy on the same log-probs, negative A included."""
    _, completions, train = make_batch(session)
    config = settings()
    policy = nnx.merge(session.parts.graphdef, *states(session))
    logprobs, entropy = (
        np.asarray(x, np.float64)
        for x in tree_logprobs(policy, train, session.vocabulary.banned, config)
    )
    total = 0.0
    for p, g, c in np.ndindex(*completions.completion_tokens.shape):
        if c >= completions.lengths[p, g]:
            continue
        advantage = float(train.advantages[p, g])
        rho = np.exp(np.clip(logprobs[p, g, c] - train.old_logprobs[p, g, c], -20, 20))
        value = max(-advantage * rho, -advantage * np.clip(rho, 0.8, 1.2))
        if advantage < 0:
            value = min(-advantage * 3.0, value)
        gap = np.clip(train.ref_logprobs[p, g, c] - logprobs[p, g, c], -20, 20)
        value += 0.05 * np.clip(np.exp(gap) - gap - 1, -10, 10)
        total += train.weights[p, g, c] * (value - 0.01 * entropy[p, g, c])
    on_device = jax.tree.map(jnp.asarray, train)
    loss, _ = update.batch_loss(policy, on_device, jnp.asarray(session.vocabulary.banned), config)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def trained_by(train, completions, aggregation, normalization):
    """`train` weighted by an aggregation, with two answers that teach nothing."""
    valid = np.ones(completions.lengths.shape, bool)
    valid[1, 2] = valid[3, 0] = False
    weights = token_weights(
        completions.lengths.reshape(-1),
        valid.reshape(-1),
        completions.completion_tokens.shape[2],
        aggregation,
        normalization,
        verl_micro_batch=4,
    )
    return dataclasses.replace(train, weights=weights.reshape(train.weights.shape))


@pytest.mark.parametrize("normalization", ["global", "verl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_statistics_are_means_over_tokens(session, aggregation, normalization):
    """Whatever weighs the loss: each fraction counts tokens, each trained token once."""
    _, completions, train = make_batch(session)
    config = settings()
    policy = nnx.merge(session.parts.graphdef, *states(session))
    logprobs, entropy = (
        np.asarray(x) for x in tree_logprobs(policy, train, session.vocabulary.banned, config)
    )
    shifts = np.array([-1.5, 0.0, 0.5])[np.arange(logprobs.shape[2]) % 3]  # ratios 4.5, 1, 0.6
    train = trained_by(train, completions, aggregation, normalization)
    train = dataclasses.replace(train, old_logprobs=(logprobs + shifts).astype(np.float32))
    *_, sums = run_update(session, train, 2, config)
    sums = dict(jax.device_get(sums))
    sums.pop("logprobs")
    found = update.step_statistics([sums])

    is_trained = train.weights > 0
    assert is_trained.sum() == sums["tokens"] < completions.lengths.sum()
    advantages = np.broadcast_to(train.advantages[..., None], is_trained.shape)[is_trained]
    logprobs, entropy = logprobs[is_trained], entropy[is_trained]
    rho = np.exp(logprobs - train.old_logprobs[is_trained])
    gap = train.ref_logprobs[is_trained] - logprobs
    expected = {
        "clip_low_frac": np.mean((advantages < 0) & (rho < 0.8)),
        "clip_high_frac": np.mean((advantages > 0) & (rho > 1.2)),
        "dual_frac": np.mean((advantages < 0) & (rho > 3)),
        "entropy": entropy.mean(),
        "kl": np.mean(np.clip(np.exp(gap) - gap - 1, -10, 10)),
    }
    assert expected.keys() == set(update.TOKEN_MEANS)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
        assert name in ("entropy", "kl") or 0 < found[name] <= 1
    assert found["loss"] == float(sums["loss"])  # which does carry the weights


def test_statistics_of_a_step_by_hand():
    """Three tokens in one update and one in the next: a token counts as much in either."""
    first = {"tokens": 3.0, "entropy": 6.0, "dual_frac": 3.0, "loss": 1.0, "grad_norm": 2.0}
    second = {"tokens": 1.0, "entropy": 10.0, "dual_frac": 0.0, "loss": 3.0, "grad_norm": 4.0}
    assert update.step_statistics([first, second]) == {
        "entropy": 4.0,
        "dual_frac": 0.75,
        "loss": 2.0,
        "grad_norm": 3.0,
    }
    nothing = {"tokens": 0.0, "entropy": 0.0, "loss": 0.0}
    assert np.isnan(update.step_statistics([nothing])["entropy"])
    assert update.step_statistics([nothing])["loss"] == 0


def test_mini_batches_cover_the_step():
    config = open_small_session(train__prompts_per_update=2).config
    assert learn.mini_batches(config) == [slice(0, 2), slice(2, 4)]
