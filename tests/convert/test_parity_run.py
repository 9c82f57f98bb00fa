"""`run_parity` end to end on a directory as a user has it."""

from __future__ import annotations

from speciarl_jax.convert.parity import run_parity


def test_a_sound_checkpoint_passes(hf_dir):
    report = run_parity(hf_dir, tolerance=2e-5, num_greedy=64)
    print(report.summary())
    assert report.exit_code == 0
