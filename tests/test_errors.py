"""Each expected error ends the command with its own code."""

import pytest

from speciarl_jax import errors
from speciarl_jax.judge.base import JudgeDownError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a flag"), 2),
        (OSError("a disk"), 1),
        (JudgeDownError("nobody answers"), 1),
        (errors.TrainingStopped("labels are missing"), 1),
        (errors.Preempted("saved"), 75),
    ],
)
def test_exit_codes(error, code):
    assert isinstance(error, errors.EXPECTED)
    assert errors.exit_code(error) == code


def test_a_defect_is_not_expected():
    assert not isinstance(KeyError("a defect shows its traceback"), errors.EXPECTED)
