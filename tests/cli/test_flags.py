"""Flags of `speciarl train` that decide what happens to a used directory."""

import pytest

from speciarl_jax.cli import main

TRAIN = ["train", "--config=r.py", "--workdir=d"]


@pytest.mark.parametrize(
    ("words", "expected"), [([], False), (["--resume"], True), (["--resume=auto"], "auto")]
)
def test_resume_is_no_yes_or_auto(words, expected):
    assert main.make_parser().parse_args([*TRAIN, *words]).resume == expected


def test_another_resume_is_refused(capsys):
    assert main.main([*TRAIN, "--resume=maybe"]) == 2
    assert "--resume: invalid choice: 'maybe'" in capsys.readouterr().err
