"""The witness of refactors: what it calls equal, what it refuses, and whose code it runs."""

import math
import pathlib
import subprocess
import sys

import pytest

from speciarl_jax.monitor import writer
from tests.drills import witness, witness_trees
from tests.drills.witness_runs import COMMON, RUNS, SMOKE, Evidence, Run, unmet


def evidence(*rows, evals=None, rollouts=None):
    return Evidence(list(rows), evals or {}, rollouts or {}, 1.0)


def compared(base, tree):
    return witness.compare(witness.values_of(base), witness.values_of(tree))


@pytest.mark.parametrize(
    ("a", "b", "is_same"),
    [
        (0.1, 0.1, True),
        (0.1, math.nextafter(0.1, 1), False),
        (math.nan, math.nan, True),
        (math.nan, 0.0, False),
        (0.0, -0.0, False),
        (None, None, True),  # not finite, as metrics.jsonl has it
        (None, 0.0, False),
        (1, 1.0, True),
        (1, True, False),
        ("wren", "wren", True),
        ("wren", "heron", False),
    ],
)
def test_same_is_bit_for_bit(a, b, is_same):
    assert witness.same(a, b) == is_same
    assert witness.same(b, a) == is_same


def test_equal_but_for_times_and_new_names():
    base = evidence({"step": 1, "policy/loss": math.nan, "time/step_s": 1.0})
    tree = evidence({"step": 1, "policy/loss": math.nan, "time/step_s": 2.0, "policy/new": 3.0})
    result = compared(base, tree)
    assert result.is_equal
    assert result.count == 2
    assert result.text() == "equal; new: policy/new"


def test_first_difference_is_named_with_both_values():
    base = evidence(*({"step": i, "policy/loss": 0.5, "policy/kl": 0.25} for i in (1, 2)))
    tree = evidence(*({"step": i, "policy/loss": 0.5, "policy/kl": 0.25 * i} for i in (1, 2)))
    result = compared(base, tree)
    assert not result.is_equal
    assert result.differences == [("step 2", "policy/kl", 0.25, 0.5)]
    assert result.text() == "DIFFERS at step 2 policy/kl: 0.25, tree 0.5 (and 0 more)"


def test_a_name_or_a_row_that_is_gone_is_a_failure():
    base = evidence(*({"step": i, "policy/loss": 0.5, "policy/kl": 0.25} for i in (1, 2)))
    result = compared(base, evidence(*({"step": i, "policy/loss": 0.5} for i in (1, 2))))
    assert not result.is_equal
    assert result.text() == "GONE: policy/kl"
    result = compared(base, evidence(base.rows[0]))
    assert not result.is_equal
    assert result.text() == "GONE: step 2"


def test_scores_and_rollouts_are_compared():
    row = {"step": 1}
    lines = {"step_000001": [{"completion": "a", "advantage": 0.5}]}
    base = evidence(row, evals={"base": {"averages": {"all": [0.5, None]}}}, rollouts=lines)
    assert compared(base, base).count == 5
    other = evidence(row, evals={"base": {"averages": {"all": [0.5, 0.1]}}}, rollouts=lines)
    assert compared(base, other).differences == [("eval/base", "averages/all/1", None, 0.1)]
    lines = {"step_000001": [{"completion": "b", "advantage": 0.5}]}
    other = evidence(row, evals=base.evals, rollouts=lines)
    assert compared(base, other).differences == [("step 1", "rollouts/0/completion", "a", "b")]


def test_no_deterministic_metric_is_excused():
    assert witness.NONDETERMINISTIC == writer.NONDETERMINISTIC


def acting_row(step=1, **changes):
    row = {"step": step, "policy/grad_norm": 0.1, "policy/loss": 0.5}
    row |= {"policy/clip_low_frac": 0.01, "policy/clip_high_frac": 0.01}
    row |= {"rollout/tokens_min": 20, "rollout/tokens_max": 26, "category/wrong_frac": 0.5}
    return row | changes


ACTING = ("learns_something", "clips", "cuts_gradients", "noise", "overlong")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"policy/clip_low_frac": 0.0}, "no ratio clipped"),
        ({"policy/grad_norm": 0.01}, "no gradient above"),
        ({"policy/grad_norm": 0.0}, "without a gradient"),
        ({"rollout/tokens_max": 24}, "penalised for length"),
        ({"rollout/tokens_min": 25}, "penalised for length"),
        ({"category/wrong_frac": 1.0}, "no label moved"),
    ],
)
def test_a_calm_run_is_no_witness(changes, reason):
    run = Run("a", "recipe.py", COMMON, ACTING, num_steps=1)
    lines = {"step_000001": [{"category": "wrong"}, {"category": "wrong"}]}
    found = unmet(run, evidence(acting_row(**changes), rollouts=lines), {})
    assert bool(found) == (reason is not None)
    assert reason is None or any(reason in line for line in found)


def test_a_run_that_equals_the_one_it_is_held_against_is_no_witness():
    run = Run("b", "recipe.py", COMMON, (), differs=("a", "policy/loss"), num_steps=1)
    other = {"a": evidence(acting_row())}
    assert "did nothing" in unmet(run, evidence(acting_row()), other)[0]
    assert unmet(run, evidence(acting_row(**{"policy/loss": 0.6})), other) == []
    assert unmet(run, evidence(), other) == ["0 rows, expected at least 1"]


def test_chosen_runs_come_after_what_they_are_held_against():
    assert [run.name for run in witness.choose([], False)] == [run.name for run in RUNS]
    assert [run.name for run in witness.choose(["verl"], False)] == ["grpo", "verl"]
    assert witness.choose([], True)[-2:] == list(SMOKE)
    with pytest.raises(ValueError, match="--only=gpro: expected one of grpo"):
        witness.choose(["gpro"], False)


def make_tree(folder, body, name="speciarl_jax.door:main"):
    package = folder / "speciarl_jax"
    package.mkdir(parents=True)
    (folder / "setup.py").write_text(f'entry_points=["speciarl={name}"]')
    (package / "__init__.py").write_text("")
    (package / "door.py").write_text(f"def main():\n    {body}\n")
    return folder


def launch(tree, *arguments):
    words = [sys.executable, "-c", witness_trees.LAUNCHER, str(tree)]
    return subprocess.run(
        [*words, *witness_trees.entry_point(tree), *arguments],
        cwd=tree,
        env={"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tree_runs_its_own_package(tmp_path):
    body = "import sys; print(sys.argv[1:], __file__); return 3"
    done = launch(make_tree(tmp_path, body), "train", "--workdir=a")
    assert done.returncode == 3, done.stderr
    file = tmp_path / "speciarl_jax" / "door.py"
    assert done.stdout.strip() == f"['train', '--workdir=a'] {file}"


def test_a_module_that_the_tree_lacks_is_not_taken_from_the_editable_install(tmp_path):
    done = launch(make_tree(tmp_path, "import speciarl_jax.types; return 0"))
    assert done.returncode == 1
    assert "No module named 'speciarl_jax.types'" in done.stderr


def test_a_module_from_elsewhere_ends_the_run(tmp_path):
    root = str(pathlib.Path(witness.ROOT) / "speciarl_jax")
    body = f"import speciarl_jax; speciarl_jax.__path__.append({root!r})"
    done = launch(make_tree(tmp_path, f"{body}; import speciarl_jax.types; return 0"))
    assert done.returncode == 1
    assert "witness: speciarl_jax.types was imported from" in done.stderr


def test_a_tree_without_a_door_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the console script"):
        witness_trees.entry_point(make_tree(tmp_path, "return 0", name="none"))


def test_the_copy_of_the_working_tree_is_its_contents():
    packed = witness_trees.pack_working_tree()
    assert packed == witness_trees.pack_working_tree()
    assert b"def main(" in packed


def test_an_unknown_commit_is_one_line(capsys, tmp_path):
    assert witness.main(["--base=nowhere", f"--cache={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("witness: error: git rev-parse")
    assert error.count("\n") == 1
