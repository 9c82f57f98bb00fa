"""Losses: by hand, against float64 scalar loops, against numbers TRL printed, and gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speciarl_jax.objective import loss as loss_lib
from speciarl_jax.objective.loss import importance_weights, k3_kl, sft_loss
from speciarl_jax.objective.token_weights import token_weights

policy_loss = jax.jit(loss_lib.policy_loss, static_argnums=(3, 4, 5))
gspo_loss = jax.jit(loss_lib.gspo_loss, static_argnums=(4, 5, 6))

# --- scalar references, plain Python floats -----------------------------------------------------


def reference_clipped(rho: float, adv: float, low: float, high: float, dual: float) -> float:
    loss = max(-adv * rho, -adv * min(max(rho, 1 - low), 1 + high))
    if adv < 0 and dual:
        loss = min(-adv * dual, loss)
    return loss


def reference_ratio(difference: float) -> float:
    return math.exp(min(max(difference, -20.0), 20.0))


def reference_k3(policy: float, ref: float) -> float:
    d = min(max(ref - policy, -20.0), 20.0)
    return min(max(math.exp(d) - d - 1, -10.0), 10.0)


def random_batch(seed: int, rows: int = 6, width: int = 9) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, width))
    policy = old + rng.normal(scale=0.7, size=(rows, width))
    ref = old + rng.normal(scale=0.7, size=(rows, width))
    return tuple(np.float32(x) for x in (policy, old, ref, rng.normal(size=rows)))


# --- the clipped loss ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "flags"),
    [
        # lo .2, hi .28, c 3; flags: clip_low, clip_high, dual
        (1.0, 2.0, -2.0, (0, 0, 0)),
        (1.5, 2.0, -2.56, (0, 1, 0)),  # a gain beyond 1.28 is ignored
        (0.5, 2.0, -1.0, (0, 0, 0)),  # a good token that became rarer is never clipped
        (0.5, -2.0, 1.6, (1, 0, 0)),  # a bad token already rare enough: held at .8
        (1.5, -2.0, 3.0, (0, 0, 0)),  # a bad token that became likelier is not clipped ...
        (4.0, -2.0, 6.0, (0, 0, 1)),  # ... until the dual clip at c = 3
        (4.0, 2.0, -2.56, (0, 1, 0)),  # the dual clip is for A < 0 only
        (4.0, 0.0, 0.0, (0, 0, 0)),
        (0.1, 0.0, 0.0, (0, 0, 0)),
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, loss: float, flags: tuple[int, int, int]
) -> None:
    policy, old = jnp.array([[math.log(ratio) - 1.5]]), jnp.array([[-1.5]])
    got, stats = policy_loss(policy, old, jnp.array([advantage]), 0.2, 0.28, 3.0)
    np.testing.assert_allclose(got, [[loss]], rtol=1e-6, atol=1e-7)
    assert tuple(int(x[0, 0]) for x in stats[:3]) == flags
    np.testing.assert_allclose(stats.ratio, [[ratio]], rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0),  # on-policy: d loss / d log pi = -A, the tie of max() included
        (1.0, -2.0, 2.0),
        (1.2, 2.0, -2.4),
        (1.5, 2.0, 0.0),
        (0.5, 2.0, -1.0),
        (0.5, -2.0, 0.0),
        (1.5, -2.0, 3.0),
        (4.0, -2.0, 0.0),
    ],
)
def test_policy_gradient_by_hand(ratio: float, advantage: float, gradient: float) -> None:
    def loss(policy: jax.Array) -> jax.Array:
        old, advantages = jnp.array([[-1.5]]), jnp.array([advantage])
        return jnp.sum(policy_loss(policy, old, advantages, 0.2, 0.28, 3.0)[0])

    got = jax.jit(jax.grad(loss))(jnp.array([[math.log(ratio) - 1.5]]))
    np.testing.assert_allclose(got, [[gradient]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.2, 3.0), (0.2, 0.28, 10.0), (0.1, 0.3, 0)]
)
def test_policy_loss_matches_reference(low: float, high: float, dual: float) -> None:
    policy, old, _, advantages = random_batch(0, rows=40)
    got, stats = policy_loss(policy, old, advantages, low, high, dual)
    got, stats = jax.device_get((got, stats))
    num_flags = np.zeros(3, int)
    for i, t in np.ndindex(policy.shape):
        rho = reference_ratio(float(policy[i, t]) - float(old[i, t]))
        adv = float(advantages[i])
        expected = reference_clipped(rho, adv, low, high, dual)
        assert float(got[i, t]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        flags = (adv < 0 and rho < 1 - low, adv > 0 and rho > 1 + high,
                 bool(dual) and adv < 0 and rho > dual)  # fmt: skip
        assert tuple(bool(x[i, t]) for x in stats[:3]) == flags
        num_flags += np.array(flags)
    assert np.all(num_flags[:2] > 0)
    assert (num_flags[2] > 0) == (dual == 3.0)


def test_advantages_per_sequence_or_per_token() -> None:
    policy, old, _, advantages = random_batch(1)
    one = policy_loss(policy, old, advantages, 0.2, 0.2, 3.0)[0]
    same = policy_loss(policy, old, np.repeat(advantages[:, None], 9, 1), 0.2, 0.2, 3.0)[0]
    np.testing.assert_array_equal(one, same)
    grouped = policy_loss(
        policy.reshape(2, 3, 9), old.reshape(2, 3, 9), advantages.reshape(2, 3), 0.2, 0.2, 3.0
    )[0]
    np.testing.assert_array_equal(grouped.reshape(6, 9), one)


def test_old_logprobs_and_statistics_carry_no_gradient() -> None:
    policy, old, _, advantages = random_batch(5)
    mask = np.ones(policy.shape, bool)
    for loss in (
        lambda p, o: policy_loss(p, o, advantages, 0.2, 0.2, 3.0),
        lambda p, o: gspo_loss(p, o, advantages, mask, 0.2, 0.2),
    ):
        by_old = jax.jit(jax.grad(lambda o, f=loss: jnp.sum(f(policy, o)[0])))(old)
        by_ratio = jax.jit(jax.grad(lambda p, f=loss: jnp.sum(f(p, old)[1].ratio)))(policy)
        np.testing.assert_array_equal(by_old, np.zeros(old.shape))
        np.testing.assert_array_equal(by_ratio, np.zeros(old.shape))


def test_extreme_ratios_stay_finite() -> None:
    policy, old = jnp.array([[0.0, -500.0, -1.0]]), jnp.array([[-500.0, 0.0, -1.0]])
    got, stats = policy_loss(policy, old, jnp.array([-1.0]), 0.2, 0.2, 0.0)
    np.testing.assert_allclose(stats.ratio, [[math.exp(20), math.exp(-20), 1]], rtol=1e-6)
    np.testing.assert_allclose(got, [[math.exp(20), 0.8, 1]], rtol=1e-6)


# --- KL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "ref", "expected"),
    [
        (-1.0, -1.0, 0.0),
        (-1.0, -2.0, math.exp(-1)),  # d = -1: e^-1 + 1 - 1
        (-2.0, -1.0, math.e - 2),
        (-30.0, -1.0, 10.0),  # clipped above
        (-1.0, -30.0, 10.0),  # d = -20 after its own clip: 19, clipped to 10
        (-1.0, -8.0, math.exp(-7) + 6),
    ],
)
def test_k3_by_hand(policy: float, ref: float, expected: float) -> None:
    got = k3_kl(jnp.array([[policy]]), jnp.array([[ref]]))
    np.testing.assert_allclose(got, [[expected]], rtol=1e-6, atol=1e-7)


def test_k3_matches_reference_and_keeps_small_digits() -> None:
    policy, _, ref, _ = random_batch(2)
    got = jax.device_get(k3_kl(jnp.asarray(policy), jnp.asarray(ref)))
    for i, t in np.ndindex(policy.shape):
        expected = reference_k3(float(policy[i, t]), float(ref[i, t]))
        assert float(got[i, t]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # near 0, exp(d) - d - 1 in float32 would be off by up to 1.2e-7
    gaps = np.float32([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    small = k3_kl(jnp.asarray(-gaps[None]), jnp.zeros((1, 5)))
    gaps = gaps.astype(np.float64)
    np.testing.assert_allclose(small, [gaps**2 / 2 + gaps**3 / 6 + gaps**4 / 24], rtol=2e-3)


def test_k3_gradient() -> None:
    def total(policy: jax.Array, ref: jax.Array) -> jax.Array:
        return jnp.sum(k3_kl(policy, ref))

    policy, ref = jnp.array([[-1.0, -2.0, -30.0]]), jnp.array([[-2.0, -1.0, -1.0]])
    by_policy, by_ref = jax.jit(jax.grad(total, argnums=(0, 1)))(policy, ref)
    # d/d policy = 1 - exp(ref - policy); 0 where clipped; the reference is a constant
    np.testing.assert_allclose(by_policy, [[1 - math.exp(-1), 1 - math.e, 0]], rtol=1e-6)
    np.testing.assert_array_equal(by_ref, np.zeros((1, 3)))


# --- GSPO ---------------------------------------------------------------------------------------


def test_gspo_matches_reference() -> None:
    policy, old, _, advantages = random_batch(3, rows=20)
    policy = old + np.float32(0.2) * (policy - old)
    lengths = np.random.default_rng(3).integers(1, 10, 20)
    mask = np.arange(9) < lengths[:, None]
    got, stats = gspo_loss(policy, old, advantages, mask, 0.05, 0.08)
    got, stats = jax.device_get((got, stats))
    clipped = 0
    for i, n in enumerate(lengths.tolist()):
        gaps = [float(policy[i, t]) - float(old[i, t]) for t in range(n)]
        rho = reference_ratio(sum(gaps) / n)
        expected = reference_clipped(rho, float(advantages[i]), 0.05, 0.08, 0)
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.ratio[i], rho, rtol=1e-5)
        clipped += int(stats.clip_low[i, 0]) + int(stats.clip_high[i, 0])
    assert 0 < clipped < 20


def test_gspo_gradient_is_that_of_the_sequence_ratio() -> None:
    policy, old = jnp.array([[-1.0, -2.0, -0.5]]), jnp.array([[-1.1, -1.9, 77.0]])
    mask, advantages = jnp.array([[True, True, False]]), jnp.array([1.5])
    weights = token_weights(np.array([2]), np.array([True]), 3, "seq-mean-token-mean")

    def loss(policy: jax.Array) -> jax.Array:
        return jnp.sum(weights * gspo_loss(policy, old, advantages, mask, 0.2, 0.2)[0])

    # s = exp((.1 - .1) / 2) = 1, loss -A s, d/d policy_t = -A s / 2
    value, gradient = jax.jit(jax.value_and_grad(loss))(policy)
    np.testing.assert_allclose(value, -1.5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.75, -0.75, 0]], rtol=1e-6)


# --- importance weights, SFT --------------------------------------------------------------------


def test_importance_weights() -> None:
    old, rollout = jnp.array([[-1.0, -1.0, -1.0, 0.0]]), jnp.array([[-1.0, -1.5, -0.5, -99.0]])
    got = importance_weights(old, rollout, 1.5)
    np.testing.assert_allclose(got, [[1, 1.5, math.exp(-0.5), 1.5]], rtol=1e-6)
    np.testing.assert_allclose(
        importance_weights(old, rollout, 2.0)[0, 1], math.exp(0.5), rtol=1e-6
    )
    gradient = jax.grad(lambda x: jnp.sum(importance_weights(x, rollout, 2.0)))(old)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_sft_loss_by_hand() -> None:
    weights = token_weights(np.array([2, 1]), np.ones(2, bool), 2, "token-mean")
    logprobs = jnp.array([[-1.0, -2.0], [-3.0, -50.0]])
    np.testing.assert_allclose(jnp.sum(weights * sft_loss(logprobs)), 2.0, rtol=1e-6)


# --- masked positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("which", ["policy", "kl", "gspo", "importance"])
def test_masked_positions_poison_neither_loss_nor_gradient(which: str, bad: float) -> None:
    policy, old, ref, advantages = random_batch(4)
    lengths = np.array([9, 1, 4, 0, 2, 8])  # the fourth row is padding
    mask = jnp.asarray(np.arange(9) < lengths[:, None])
    weights = token_weights(lengths, np.ones(6, bool), 9, "token-mean")

    def loss(policy: jax.Array, old: jax.Array, ref: jax.Array) -> jax.Array:
        per_token = {
            "policy": lambda: policy_loss(policy, old, advantages, 0.2, 0.2, 3.0, mask)[0],
            "kl": lambda: k3_kl(policy, ref, mask),
            "gspo": lambda: gspo_loss(policy, old, advantages, mask, 0.2, 0.2)[0],
            "importance": lambda: (
                importance_weights(old, ref, 2.0, mask) * jnp.where(mask, policy, 0.0)
            ),
        }[which]()
        return jnp.sum(weights * per_token)

    run = jax.jit(jax.value_and_grad(loss))
    clean = run(policy, old, ref)
    poisoned = run(*(np.where(mask, x, bad) for x in (policy, old, ref)))
    assert np.isfinite(clean[0])
    np.testing.assert_array_equal(poisoned[0], clean[0])
    np.testing.assert_array_equal(poisoned[1], np.where(mask, clean[1], 0))
    assert np.all(np.isfinite(poisoned[1]))
    assert np.any(np.asarray(poisoned[1]) != 0)


# --- TRL ----------------------------------------------------------------------------------------

# Printed by TRL 1.16.0 (GRPOTrainer._compute_loss, float64, run once on these log-probs with
# epsilon .2, epsilon_high .28, beta .04, max_completion_length 6): loss, then d loss / d policy.
TRL_POLICY = [[-1.0, -0.5, -2.0, -0.1], [-0.7, -1.2, -0.3, -0.9], [-1.5, -0.2, -0.4, -3.0]]
TRL_OLD = [[-1.3, -0.5, -1.5, -0.2], [-2.2, -0.9, -0.3, -0.9], [-1.4, -1.0, -0.9, -1.0]]
TRL_REF = [[-0.8, -0.6, -2.5, -0.1], [-0.7, -1.0, -0.4, -0.9], [-2.0, -0.2, -0.1, -2.0]]
TRL_LENGTHS, TRL_ADVANTAGES = np.array([4, 3, 2]), [1.5, -0.75, -0.5]


def trl_case(aggregation: str, kl_coef: float, dual: float) -> tuple[float, np.ndarray]:
    weights = token_weights(TRL_LENGTHS, np.ones(3, bool), 4, aggregation, loss_norm_tokens=6)

    def loss(policy: jax.Array) -> jax.Array:
        old, advantages = jnp.array(TRL_OLD), jnp.array(TRL_ADVANTAGES)
        per_token = policy_loss(policy, old, advantages, 0.2, 0.28, dual)[0]
        return jnp.sum(weights * (per_token + kl_coef * k3_kl(policy, jnp.array(TRL_REF))))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(TRL_POLICY))
    return float(value), np.asarray(gradient).ravel()


@pytest.mark.parametrize(
    ("trl_loss_type", "aggregation", "kl_coef", "dual", "value", "gradient"),
    [
        ("grpo", "seq-mean-token-mean", 0.04, 0, 0.2866456510384355,
         [-0.000738009, -0.124682791, -0.074504768, -0.138146365, 0.373474089, -0.000984012,
          0.083756278, 0.0, 0.078026247, 0.185461744, 0.0, 0.0]),
        ("bnpo and dapo", "token-mean", 0.04, 0, 0.03328058624533803,
         [-0.000984012, -0.166243722, -0.099339691, -0.184195153, 0.373474089, -0.000984012,
          0.083756278, 0.0, 0.052017498, 0.123641163, 0.0, 0.0]),
        ("dr_grpo", "seq-mean-token-sum-norm", 0.04, 0, 0.016640293122669014,
         [-0.000492006, -0.083121861, -0.049669845, -0.092097577, 0.186737045, -0.000492006,
          0.041878139, 0.0, 0.026008749, 0.061820581, 0.0, 0.0]),
        ("bnpo, delta 3, beta 0", "token-mean", 0.0, 3.0, -0.09137368815757865,
         [0.0, -0.166666667, -0.101088443, -0.184195153, 0.0, 0.0, 0.083333333, 0.0, 0.050268745,
          0.123641163, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_matches_trl(
    trl_loss_type: str,
    aggregation: str,
    kl_coef: float,
    dual: float,
    value: float,
    gradient: list[float],
) -> None:
    got_value, got_gradient = trl_case(aggregation, kl_coef, dual)
    assert got_value == pytest.approx(value, rel=1e-5, abs=1e-7), trl_loss_type
    np.testing.assert_allclose(got_gradient, gradient, rtol=2e-5, atol=2e-7)


def test_gspo_matches_trl() -> None:
    """TRL 1.16.0, importance_sampling_level="sequence", epsilon .05/.08, beta 0, loss "grpo"."""
    mask = np.arange(4) < TRL_LENGTHS[:, None]
    weights = token_weights(TRL_LENGTHS, np.ones(3, bool), 4, "seq-mean-token-mean")

    def loss(policy: jax.Array) -> jax.Array:
        old, advantages = jnp.array(TRL_OLD), jnp.array(TRL_ADVANTAGES)
        return jnp.sum(weights * gspo_loss(policy, old, advantages, mask, 0.05, 0.08)[0])

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(TRL_POLICY))
    assert float(value) == pytest.approx(0.1218124764950274, rel=1e-5)
    expected = [[-0.121913739] * 4, [0.124318725] * 3 + [0], [0.118255629] * 2 + [0] * 2]
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-7)
