"""int8 storage, reads without an upcast, and how far reduced precision moves log-probs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import abstract_policy
from speciarl_jax.rollout import cache, decode
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling
from tests.rollout.test_memory import generate
from tests.support.tiny_policy import full_logits, open_small_session, small_batch


def exact_attention(q, k, v, mask):
    scores = np.einsum("xkqa,xtka->xkqt", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(mask, scores, -np.inf))
    return np.einsum("xkqt,xtka->xkqa", weights / weights.sum(-1, keepdims=True), v)


def test_quantising_by_hand():
    values, scale = cache.quantise(jnp.array([[1.27, -0.64, 0.004], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(values, [[127, -64, 0], [0, 0, 0]])
    np.testing.assert_allclose(scale, [0.01, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("is_int8", "tolerance"), [(False, 1e-6), (True, 0.02)])
def test_two_parts_make_one_softmax(is_int8, tolerance):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in [(3, 2, 4, 8), *[(3, 9, 2, 8)] * 2])
    mask = rng.random((3, 1, 1, 9)) < 0.8
    mask[..., 0] = mask[..., 5] = True
    kv = cache.pack(jnp.asarray(k), jnp.asarray(v), is_int8)
    parts = [
        cache.partial_softmax(
            jnp.asarray(q),
            cache.store(jax.tree.map(lambda x, s=s: x[:, s], kv)),
            jnp.asarray(mask[..., s]),
        )
        for s in (slice(0, 5), slice(5, 9))
    ]
    expected = exact_attention(q, k, v, mask)
    np.testing.assert_allclose(cache.join(tuple(parts)), expected, atol=tolerance)


def decode_jaxpr(session, is_int8):
    """The decode program in bfloat16, abstractly: (jaxpr, elements of one layer of own cache)."""
    arch = session.arch
    graphdef, state = nnx.split(abstract_policy(arch, Dtypes(jnp.bfloat16, jnp.bfloat16)))
    prompts, length, rows, columns = 2, 64, 6, 128
    dtype = jnp.int8 if is_int8 else jnp.bfloat16
    heads, width = arch.text.num_kv_heads, arch.text.head_dim

    def run(state):
        empty = [
            cache.empty((arch.text.num_layers, x, heads, t, width), dtype, Placement())
            for x, t in ((prompts, length), (rows, columns))
        ]
        hidden = jnp.zeros((prompts, arch.text.hidden_size), jnp.bfloat16)
        ones = jnp.ones(prompts, jnp.int32)
        prompt_cache = decode.PromptCache(empty[0], ones, hidden, ones)
        row = jnp.arange(rows, dtype=jnp.int32)
        maps = decode.RowMap(row // 3, row, row.reshape(2, 3))
        keys, free = jnp.zeros((rows, 2), jnp.uint32), jnp.zeros(rows, bool)
        start = decode.start(prompt_cache, maps, keys, free, columns, Placement())
        banned, stops = jnp.zeros(arch.text.vocab_size, bool), jnp.array([1], jnp.int32)
        limits = (jnp.int32(4), jnp.int32(0))
        return decode.decode_chunk(
            graphdef,
            (state,),
            prompt_cache,
            *(maps, start, free, stops, banned, *limits, Sampling(), Placement()),
        )

    return jax.make_jaxpr(run)(state), prompts * length * heads * width


def conversions_to_float32(jaxpr, dtypes):
    """Sizes of the arrays of `dtypes` that a jaxpr converts to float32, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type":
            source = eqn.invars[0].aval
            if eqn.params["new_dtype"] == jnp.float32 and source.dtype in dtypes:
                yield source.size
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from conversions_to_float32(inner, dtypes)


@pytest.mark.parametrize("is_int8", [False, True])
def test_decoding_never_converts_a_cache_to_float32(session, is_int8):
    jaxpr, cache_size = decode_jaxpr(session, is_int8)
    sizes = list(conversions_to_float32(jaxpr.jaxpr, (jnp.bfloat16, jnp.int8)))
    assert sizes  # norms work in float32: the search finds conversions
    assert max(sizes) < cache_size


@pytest.fixture(scope="module")
def session():
    return open_small_session()


def plain_gaps(session, rows, batch):
    """|sampler - plain forward in the session's dtype| of every sampled token."""
    gaps = []
    for (prompt, _), row in rows.items():
        logits = full_logits(session, batch, prompt, row.completion_tokens)
        logits[:, session.vocabulary.banned] = -np.inf
        start = int(batch.prompt_lengths[prompt]) - 1
        logprobs = jax.nn.log_softmax(logits[start : start + len(row.completion_tokens)], axis=-1)
        chosen = np.asarray(logprobs)[np.arange(len(row.completion_tokens)), row.completion_tokens]
        gaps.append(np.abs(chosen - row.logprobs))
    return np.concatenate(gaps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "dtype", "kv", "mean", "p99"),
    [
        # About three times what was measured (docs/benchmarks.md); random weights: looser.
        ("tiny", "float32", "int8", 5e-5, 1.2e-3),
        ("tiny", "bfloat16", "compute", 2e-4, 6e-3),
        ("tiny", "bfloat16", "int8", 2.5e-4, 6e-3),
        ("random", "float32", "int8", 5e-3, 2e-2),
    ],
)
def test_reduced_precision_moves_logprobs_by_little(model, dtype, kv, mean, p99):
    changes = {} if model == "random" else {"model__path": "tiny"}
    session = open_small_session(**changes, model__param_dtype=dtype, model__compute_dtype=dtype)
    batch = small_batch(session, 6)
    config = dataclasses.replace(
        session.config.rollout, kv_cache_dtype=kv, max_completion_tokens=30, chunk_tokens=30
    )
    rows, _ = generate(session, batch, config, group_size=8)
    gaps = plain_gaps(session, rows, batch)
    print(
        f"{model} {dtype} kv={kv}: {len(gaps)} tokens, mean {gaps.mean():.1e}, "
        f"p99 {np.quantile(gaps, 0.99):.1e}, max {gaps.max():.1e}"
    )
    assert gaps.mean() < mean
    assert np.quantile(gaps, 0.99) < p99
