"""A user's own function: found, importable, and taking what it is called with."""

import re

import pytest

from speciarl_jax.config.dotted import check_call, import_function

MODULE = (
    "def reward(codes):\n    return codes\n\n\ndef two(a, b=1):\n    return a\n\n\nnumber = 3\n"
)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the path with a module that is fine and others that are not."""
    (tmp_path / "k3_fine.py").write_text(MODULE)
    (tmp_path / "k3_syntax.py").write_text("def reward(codes)\n")
    (tmp_path / "k3_name.py").write_text("undefined\n")
    (tmp_path / "k3_imports.py").write_text("import k3_nowhere\n")
    (tmp_path / "k3_exit.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "k3_zero.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.b.c", "ModuleNotFoundError: No module named 'a'"),
        ("k3_fine.other", "k3_fine has no function 'other'"),
        ("k3_fine.number", "k3_fine has no function 'number'"),
        ("k3_syntax.reward", "k3_syntax: SyntaxError: expected ':'"),
        ("k3_name.reward", "k3_name: NameError: name 'undefined'"),
        ("k3_imports.reward", "k3_imports: ModuleNotFoundError: No module named 'k3_nowhere'"),
        ("k3_exit.reward", "k3_exit: SystemExit: 0"),
        ("k3_zero.reward", "k3_zero: ZeroDivisionError"),
        (".reward", "no dotted path; expected package.module.function"),
        ("..a.reward", "no dotted path"),
        ("k3_fine.", "no dotted path"),
        ("reward", "no dotted path"),
        ("k3 fine.reward", "no dotted path"),
    ],
)
@pytest.mark.usefixtures("modules")
def test_what_cannot_be_imported_is_one_line(path, message):
    with pytest.raises(ValueError, match=f"reward '{re.escape(path)}': .*{message}") as found:
        import_function(path, "reward")
    assert "\n" not in str(found.value)


@pytest.mark.usefixtures("modules")
def test_a_function_must_take_what_it_is_called_with():
    assert import_function("k3_fine.reward", "reward")(3) == 3
    check_call("k3_fine.reward", "algo.reward", "codes")
    check_call("k3_fine.two", "algo.reward", "codes")
    check_call("k3_fine.two", "algo.name", "rewards, valid")
    check_call("builtins.max", "algo.reward", "codes")  # says nothing about what it takes
    wanted = (
        r"algo.name 'k3_fine.reward': too many .*; expected .*\(rewards, valid\), got \(codes\)"
    )
    with pytest.raises(ValueError, match=wanted):
        check_call("k3_fine.reward", "algo.name", "rewards, valid")
