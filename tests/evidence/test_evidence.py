"""The page of results is what the command makes of the file, and the acceptance check can fail."""

import collections

import pytest

from tests.evidence import run, tables
from tests.evidence.rows import DYNAMIC, ROWS, Row, in_order


def test_every_run_comes_once_and_the_most_telling_first():
    order = list(in_order())
    assert [seed for _, seed in order[:10]] == [0] * 10
    assert [row.argument for row, _ in order[:2]] == [DYNAMIC, "row=binary"]
    counts = collections.Counter(row.argument for row, _ in order)
    assert counts == {row.argument: row.num_seeds for row in ROWS}
    assert len({run.key(row, seed) for row, seed in order}) == len(order)


def test_tables_on_the_page_are_those_of_the_file():
    page = tables.PAGE.read_text()
    assert tables.filled(page, run.read_results()) == page


def scores(correctness, hm, sampled_hm):
    def stage(value):
        return {"out_of_domain": {"correctness": [correctness], "hm": [value]}}

    return {"trained": stage(hm), "trained_sampled": stage(sampled_hm)}


@pytest.mark.parametrize(
    ("found", "left"),
    [
        (scores(0.936, 0.918, 0.896), []),  # measured, one thread
        (scores(0.929, 0.916, 0.897), []),  # measured, two
        (scores(0.904, 0.904, 0.868), list(run.BAND)),  # without negative advantages, measured
        (scores(0.965, 0.672, 0.736), list(run.BAND)),  # the base
        (scores(0.647, 0.786, 0.783), list(run.BAND)),  # the binary reward
        (scores(0.936, 0.960, 0.896), ["trained/hm"]),  # too good to be true
    ],
)
def test_a_dynamic_reward_outside_its_band_is_said(found, left):
    problem = run.out_of_band(Row("", DYNAMIC), 0, found)
    assert [name for name in run.BAND if f"{name}=" in problem] == left
    assert (problem == "") == (left == [])
    assert run.out_of_band(Row("", DYNAMIC), 1, found) == ""
    assert run.out_of_band(Row("", "row=binary"), 0, found) == ""
