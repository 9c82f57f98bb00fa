"""Bytes of a rollout: by hand, against the compiled programs, and waves that change nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from speciarl_jax.arch import Arch, TextArch
from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.convert.tiny import shipped_tiny_dir
from speciarl_jax.devices.layout import param_shardings
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import abstract_policy
from speciarl_jax.rollout import decode, layout, memory
from speciarl_jax.rollout.decode import RowMap
from speciarl_jax.rollout.engine import RolloutEngine
from speciarl_jax.rollout.memory import (
    RolloutShape,
    expected_share,
    prompts_per_wave,
    rollout_bytes,
    rows_that_fit,
)
from speciarl_jax.rollout.placement import Placement
from speciarl_jax.rollout.sampling import Sampling
from tests.rollout.test_sharded import make_mesh
from tests.support.tiny_policy import open_small_session, small_batch, states

# Two layers, two key-value heads of 8: a token takes 2 * 2 * 2 * 8 * 4 = 256 bytes in float32.
ARCH = TextArch(100, 32, 64, 2, 4, 2, (1, 1, 2))
CONFIG = RolloutConfig(max_completion_tokens=64, chunk_tokens=16, compact=True)
SHAPE = RolloutShape(CONFIG, num_prompts=4, group_size=5, prompt_tokens=48, compute_bytes=4)


def with_config(**changes):
    """`SHAPE` under another configuration."""
    return dataclasses.replace(SHAPE, config=dataclasses.replace(CONFIG, **changes))


@pytest.fixture(scope="module")
def session():
    return open_small_session()


def test_bytes_by_hand():
    found = rollout_bytes(ARCH, SHAPE)
    assert found.prompt_kv == 4 * 48 * 256
    assert found.own_kv == 20 * 64 * 256
    assert found.moving == 15 * 64 * 256  # 20 rows to 15; 32 to 64 columns would copy 20 * 32
    smaller = rollout_bytes(ARCH, SHAPE, per_shard=12, columns=32)
    assert (smaller.own_kv, smaller.moving) == (12 * 32 * 256, 9 * 32 * 256)
    assert smaller.decode_step == 4 * 12 * 100 * 4 + (4 * 48 + 12 * 32) * 128
    assert found.decode_step == 4 * 20 * 100 * 4 + (4 * 48 + 20 * 64) * 128
    assert found.prefill == max(4 * 48 * 4 * (3 * 32 + 2 * 64), 2 * 4 * 4 * 48**2 * 4)
    assert found.peak == found.prompt_kv + found.own_kv + found.moving
    fixed = rollout_bytes(ARCH, with_config(compact=False))
    assert fixed.moving == 0


def test_shards_heads_and_int8_divide_the_caches():
    whole = rollout_bytes(ARCH, SHAPE)
    spread = rollout_bytes(ARCH, dataclasses.replace(SHAPE, num_shards=2, tensor=2))
    assert (whole.prompt_kv, whole.own_kv) == (4 * spread.prompt_kv, 4 * spread.own_kv)
    small = rollout_bytes(ARCH, with_config(kv_cache_dtype="int8"))
    assert small.own_kv * 32 == whole.own_kv * 12  # 8 int8 and one scale instead of 8 floats


@pytest.mark.parametrize(
    ("prompts", "limit_mb", "expected"), [(256, 0, 256), (256, 1000, 256), (256, 30, 128)]
)
def test_waves_are_as_few_as_fit(prompts, limit_mb, expected):
    shape = with_config(max_cache_mb=limit_mb, compact=False)
    assert prompts_per_wave(ARCH, dataclasses.replace(shape, num_prompts=prompts)) == expected


def test_shares_of_answers_that_are_longer():
    assert expected_share(0) == 1
    assert expected_share(120) == pytest.approx(0.5)
    assert expected_share(600) == pytest.approx(0.05)


def test_a_wave_has_room_for_expected_lengths_and_half_as_many_again():
    """40 prompts of 5 answers up to 2,048 tokens: 200 rows would take 100 MiB, 200 of 512 take 25.

    Longer than 512 and 1,024 tokens are 7 % and 1.4 %, so 21 rows and 5 are to have room.
    """
    shape = dataclasses.replace(with_config(max_completion_tokens=2048), num_prompts=40)
    for limit_mb, expected in ((200, 40), (50, 40), (16, 20)):
        config = dataclasses.replace(shape.config, max_cache_mb=limit_mb)
        limited = dataclasses.replace(shape, config=config)
        assert prompts_per_wave(ARCH, limited) == expected
        wave = dataclasses.replace(limited, num_prompts=expected)
        most = [rows_that_fit(ARCH, wave, columns) for columns in (64, 512, 1024, 2048)]
        assert most == sorted(most, reverse=True)
        assert most[-1] >= 1.5 * 5 * expected * expected_share(1024)
        peak = rollout_bytes(ARCH, wave, most[-1], 2048).peak
        assert peak <= limit_mb * 2**20
    whole = dataclasses.replace(config, compact=False, max_cache_mb=50)
    assert prompts_per_wave(ARCH, dataclasses.replace(shape, config=whole)) < 40


def test_one_prompt_that_does_not_fit_is_refused_with_the_numbers():
    shape = with_config(max_completion_tokens=8192, max_cache_mb=8, compact=False)
    with pytest.raises(
        ValueError, match=r"max_cache_mb=8: one prompt .* needs 1\d\.\d MiB a device"
    ):
        prompts_per_wave(ARCH, shape)
    # 3 rows of 8,192 tokens take 6 MiB; a batch of one prompt has no smaller size.
    shape = with_config(max_completion_tokens=8192, max_cache_mb=5)
    with pytest.raises(ValueError, match=r"with 3 answers at a time .* needs 9\.0 MiB a device"):
        prompts_per_wave(ARCH, dataclasses.replace(shape, num_prompts=1))


def generate(session, batch, config, group_size=3, mesh=None):
    mesh = mesh or session.sampling_mesh
    engine = RolloutEngine(session.parts.graphdef, config, session.vocabulary, mesh)
    options = {"group_size": group_size, "sampling": Sampling(), "seed": 1, "step": 1}
    placed = tuple(jax.device_put(s, param_shardings(s, mesh)) for s in states(session))
    embeds = jax.numpy.asarray(jax.device_get(session.encode(states(session), batch)))
    rows = {}
    for finished in engine.generate(placed, batch, embeds, **options):
        rows |= {(row.prompt, row.sample): row for row in finished}
    return rows, engine.stats


@pytest.mark.slow
def test_waves_sample_the_same(session):
    """Five prompts in waves of three, the second one filled up; equal to the last bit."""
    batch = small_batch(session, 5)
    config = dataclasses.replace(session.config.rollout, max_completion_tokens=5, compact=False)
    whole, stats = generate(session, batch, config)
    assert stats.waves == 1
    split, stats = generate(session, batch, dataclasses.replace(config, max_cache_mb=1))
    assert stats.waves == 2
    assert whole.keys() == split.keys()
    for key, row in whole.items():
        np.testing.assert_array_equal(row.completion_tokens, split[key].completion_tokens)
        np.testing.assert_array_equal(row.logprobs, split[key].logprobs)


@pytest.mark.parametrize("shape", [None, pytest.param((2, 1, 1), marks=pytest.mark.slow)], ids=str)
def test_rows_that_wait_on_the_host_sample_the_same(session, shape, monkeypatch):
    """Answers are expected to be short and are not: halves wait, twice over; the same tokens."""
    monkeypatch.setattr(memory, "MEDIAN_TOKENS", 4)
    monkeypatch.setattr(memory, "P95_TOKENS", 20)
    batch = small_batch(session, 2 if shape else 3, rows=2 if shape else 3)
    mesh = None if shape is None else make_mesh(*shape)
    config = dataclasses.replace(
        session.config.rollout, max_completion_tokens=32, chunk_tokens=8, compact=True
    )
    whole, stats = generate(session, batch, config, 16, mesh)
    assert (stats.waves, stats.parked) == (1, 0)
    limited = dataclasses.replace(config, max_cache_mb=2 if shape is None else 1)
    split, stats = generate(session, batch, limited, 16, mesh)
    assert stats.waves == 1
    assert stats.parked >= 2
    assert whole.keys() == split.keys()
    for key, row in whole.items():
        np.testing.assert_array_equal(row.completion_tokens, split[key].completion_tokens)
        # products of other numbers of rows, as after any shrinking
        np.testing.assert_allclose(row.logprobs, split[key].logprobs, atol=1e-5)


def test_halves_of_the_live_rows_of_each_shard():
    rows = layout.Rows(
        prompt=np.zeros((2, 5), np.int32),
        sample=np.arange(10, dtype=np.int32).reshape(2, 5),
        is_free=np.array([[False, True, False, False, False], [True, True, True, False, True]]),
    )
    stay, wait = rows.halves(2)
    assert [x.sample[~x.is_free].tolist() for x in (stay, wait)] == [[0, 2, 8], [3, 4]]


def test_waves_take_as_many_prompts_from_every_shard(session):
    batch = small_batch(session, 5, rows=6)
    per_image = batch.vision.mask.shape[1] // 4  # rows of the table
    found = layout.waves(batch, table_rows=6 * per_image, num_shards=2, prompts_per_wave=4)
    assert [wave.origin.tolist() for wave in found] == [[0, 1, 3, 4], [2, -1, -1, -1]]
    inside = batch.image_rows[4][batch.image_rows[4] >= 0]
    local = found[0].image_rows[3]
    # prompt 4 is the second of the second block
    np.testing.assert_array_equal(local[local >= 0], inside + per_image)


def program_temps(
    arch: Arch, prompts: int, length: int, group: int, columns: int, is_unrolled: bool
):
    """XLA's scratch bytes of prefill and decode; weights only as shapes."""
    graphdef, state = nnx.split(abstract_policy(arch, Dtypes()))
    placement, rows = Placement(is_unrolled=is_unrolled), prompts * group

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32)

    arrays = (
        *(ints(prompts, length), ints(prompts, 3, length), ints(prompts), ints(prompts)),
        ints(prompts, length),
        jax.ShapeDtypeStruct((prompts, arch.text.hidden_size), np.float32),
    )
    options = {"is_int8": False, "placement": placement}
    prefill = decode.prefill.lower(graphdef, (state,), *arrays, **options)
    row_map = RowMap(ints(rows), ints(rows), ints(prompts, group))
    is_free = jax.ShapeDtypeStruct((rows,), bool)
    start = decode.start.lower(
        prefill.out_info,
        row_map,
        jax.ShapeDtypeStruct((rows, 2), np.uint32),
        is_free,
        columns,
        placement,
    )
    banned = jax.ShapeDtypeStruct((arch.text.vocab_size,), bool)
    chunk = decode.decode_chunk.lower(
        graphdef,
        (state,),
        prefill.out_info,
        row_map,
        start.out_info,
        is_free,
        *(ints(2), banned, np.int32(1), np.int32(0), Sampling(), placement),
    )
    kv = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(prefill.out_info.kv))
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(start.out_info.own))
    temps = [x.compile().memory_analysis().temp_size_in_bytes for x in (prefill, chunk)]
    return kv, own, *temps


@pytest.mark.slow
@pytest.mark.parametrize("is_unrolled", [False, True])
def test_counted_bytes_hold_for_the_compiled_programs(is_unrolled):
    """Caches to the byte; growth of XLA's scratch memory between half and 1.25 of the count.

    In the form for accelerators, compiled for CPU; unrolled, decoding needs less than counted.
    """
    arch = Arch.from_dir(shipped_tiny_dir())
    found, counted = [], []
    for prompts, length, group, columns in ((8, 64, 4, 32), (32, 64, 4, 32), (32, 256, 4, 256)):
        found.append(program_temps(arch, prompts, length, group, columns, is_unrolled))
        config = RolloutConfig(max_completion_tokens=columns, compact=False)
        shape = RolloutShape(config, prompts, group, length, 4, is_unrolled=is_unrolled)
        bytes_ = rollout_bytes(arch.text, shape)
        counted.append((bytes_.prompt_kv, bytes_.own_kv, bytes_.prefill, bytes_.decode_step))
    found, counted = np.array(found), np.array(counted)
    np.testing.assert_array_equal(found[:, :2], counted[:, :2])
    ratios = np.diff(found[:, 2:], axis=0) / np.diff(counted[:, 2:], axis=0)
    assert is_unrolled or ratios.min() > 0.5
    assert ratios.max() < 1.25
