"""A run goes on with another mesh: a slice of another size, cut another way."""

import pytest

from speciarl_jax import train
from tests.support.training import QUIET, rows, small_config

MESHES = ({"data": 1}, {"data": 4}, {"data": 2, "tensor": 2}, {"data": 1, "fsdp": 2})


def on(mesh, **changes):
    sizes = {f"mesh__{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    return small_config(**sizes, **changes, **QUIET)


@pytest.mark.slow
def test_each_step_on_another_slice_equals_all_on_one(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train.main(on(MESHES[0], train__num_steps=len(MESHES)), whole)
    for step, mesh in enumerate(MESHES, start=1):
        train.main(on(mesh, train__num_steps=step), moved, resume="auto")
    assert [row["step"] for row in rows(moved)] == [row["step"] for row in rows(whole)]
    for row, other in zip(rows(moved), rows(whole), strict=True):
        assert {k: row[k] for k in other if k in row} == pytest.approx(other, rel=1e-4, abs=1e-4)
