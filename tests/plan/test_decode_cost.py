"""What decoding costs: the sizes it passes through and a step at each, worked by hand."""

import dataclasses

import numpy as np
import pytest

from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.plan.chips import CHIPS
from speciarl_jax.plan.decode_cost import Call, Compiled, Counted, StepCost, deal, price, schedule
from speciarl_jax.plan.measure import Traffic

CONFIG = RolloutConfig(max_completion_tokens=64, chunk_tokens=16)


def test_the_schedule_is_the_engine_s():
    """Rows 5, 20, 30 and 50 tokens long: sizes are 4 and 3 rows, 16, 32 and 64 columns."""
    calls = list(schedule(np.array([[50, 5, 30, 20]]), CONFIG))
    sizes = [(call.rows, call.columns, call.steps) for call in calls]
    assert sizes == [(4, 16, 5), (3, 16, 11), (3, 32, 16), (3, 64, 16), (3, 64, 2)]
    assert sum(call.steps for call in calls) == 50
    # 4 and 3 rows of 16 columns are read and written; then 3 rows of 16 and of 32.
    assert [call.moved for call in calls[:3]] == [0, (4 + 3) * 16, 3 * (16 + 32)]


def test_rows_without_room_wait_and_are_decoded_after():
    """Four rows to the limit, room for two with 64 columns: 32 steps of four, twice 32 of three."""
    lengths = np.full((1, 8), 64)
    lengths[0, 4:] = 1

    def fit(columns):
        return 3 if columns == 64 else 8

    calls = list(schedule(lengths, CONFIG, fit))
    assert sum(call.parked for call in calls) == 1
    assert sum(call.steps for call in calls) == 32 + 2 * 32
    assert {call.rows for call in calls if call.columns == 64} == {3}
    assert sum(call.parked for call in schedule(lengths, CONFIG)) == 0


def test_all_shards_wait_for_the_fullest():
    uneven = np.ones((2, 8), np.int64)
    uneven[0, 0], uneven[1, :6] = 40, 40
    assert [call.rows for call in schedule(uneven, CONFIG)] == [8, 6, 6, 6]


def test_without_early_exit_a_chunk_runs_to_its_end():
    config = dataclasses.replace(CONFIG, early_exit=False)
    calls = list(schedule(np.array([[50, 5, 30, 20]]), config))
    assert [call.steps for call in calls] == [16] * 4
    still = dataclasses.replace(config, compact=False)
    found = schedule(np.array([[50, 5]]), still)
    assert {(call.rows, call.columns) for call in found} == {(2, 64)}


def test_rows_are_dealt_once_each():
    lengths = np.arange(1, 25).reshape(8, 3)
    waves = deal(lengths, num_shards=2, wave_rows=5)
    assert waves.shape == (3, 2, 5)
    assert sorted(waves[waves > 0].tolist()) == list(range(1, 25))
    np.testing.assert_array_equal(waves, deal(lengths, num_shards=2, wave_rows=5))


def traffic(num_bytes, wire, hops, around):
    return Traffic({}, (0, ""), around, num_bytes, wire, hops)


def test_three_compiled_sizes_give_every_other():
    """a + b rows + c rows columns with a = 1e9, b = 1e6, c = 3e3; wire grows by rows alone."""

    def at(rows, columns):
        return traffic(10**9 + 10**6 * rows + 3000 * rows * columns, 50 * rows, 240, rows * columns)

    sizes = [(80, 2048), (80, 512), (15, 2048)]
    cost = Compiled(tuple((*size, at(*size)) for size in sizes))
    found = cost.at(30, 1024)
    assert found.num_bytes == pytest.approx(10**9 + 30 * 10**6 + 3000 * 30 * 1024)
    assert found.wire_bytes == pytest.approx(1500)
    assert (found.hops, found.around) == (pytest.approx(240), pytest.approx(30 * 1024))
    shrinking = Compiled(((80, 64, at(2, 8)), (80, 32, at(1, 8)), (40, 64, at(4, 8))))
    assert shrinking.at(200, 0).wire_bytes == 0  # 300 - 3.75 x 200


def test_a_call_s_seconds_by_hand():
    chip = CHIPS["v5e"]

    class Fixed:
        def at(self, rows, columns):
            return StepCost(num_bytes=819e6, wire_bytes=90e6, hops=100, around=819e6)

    found = price([Call(8, 16, 3, moved=1000)], Fixed(), 819, 1.0, chip)
    # a step: 1 ms of memory, 1 ms of wire, 100 hops of 1 us; once: 2 ms of copies, 1 us of moving
    assert found.seconds == pytest.approx(3 * (1e-3 + 1e-3 + 100e-6) + 2e-3 + 1e-6)
    assert found.device_bytes == 3 * 819e6 + 2 * 819e6 + 819 * 1000
    assert (found.num_steps, found.num_calls, found.wire_bytes) == (3, 1, 270e6)
    bound = price([Call(8, 16, 3)], Counted(0, 0, 0, 0), 1, chip.peak, chip)
    assert bound.seconds == pytest.approx(24)


def test_the_constants_of_the_tables_are_frozen():
    """Before and after are compared over months; a change makes docs/scale.md again, whole."""
    found = {
        name: (chip.hbm_gb_s, chip.link_gb_s, chip.hop_us, chip.usable_frac)
        for name, chip in CHIPS.items()
        if name.startswith("v")
    }
    assert found == {
        "v4": (1228, 45, 1.0, 0.96),
        "v5e": (819, 45, 1.0, 0.98),
        "v5p": (2765, 90, 1.0, 0.98),
        "v6e": (1640, 90, 1.0, 0.97),
    }
