"""The process that runs the tests of one mutant: forked from one that has the libraries loaded."""

from __future__ import annotations

import os
import sys

# Slow to import, and untouched by the faults; the fork server imports them once.
LIBRARIES = ["jax", "flax.nnx", "optax", "transformers", "orbax.checkpoint", "pytest", "beartype"]


def run_tests(tree: str, tests: tuple[str, ...], core: int, log: str) -> None:
    """Pytest on a copy of the tree; the exit code is pytest's, the output goes to `log`."""
    import pytest

    os.sched_setaffinity(0, {core})
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    # The parent's own copies of the project: the faulty one must be imported instead.
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "speciarl_jax")]:
        del sys.modules[name]
    sys.path.insert(0, tree)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = tree  # for what the tests start
    default = "not slow and not bench and not gpu and not tpu_aot and not gpu_aot"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", default]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded already
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(code))
