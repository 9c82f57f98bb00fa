"""A small version of the drill that `make drill` runs in full."""

import pytest

from tests.drills.fault_server import drill


@pytest.mark.parametrize(
    ("form", "count"), [("spread", 300), pytest.param("each", 400, marks=pytest.mark.slow)]
)
def test_nothing_lost_nothing_invented(form, count):
    report = drill(count, form, concurrency=64, timeout_s=1.0)
    assert report["lost"] == 0
    assert report["invented"] == 0
    assert report["http_requests"] > count
    assert report["rss_mb_highest"] < report["rss_mb_after_a_fifth"] + 60
