"""`speciarl <verb>`: parses and calls; errors become one line and an exit code.

0 done, 1 failed, 2 bad usage, 75 stopped by pre-emption, 130 by Ctrl-C; both saved.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from speciarl_jax import errors
from speciarl_jax.cli import check, convert, data, eval, judge, plan, report, sample, tiny, train
from speciarl_jax.devices import gpu_memory

# A page has `register(verbs)`: its verbs with a `handler` each, a function args -> exit code.
# Handlers import what they call: jax, flax and orbax take seconds that other verbs do not pay.
PAGES = (train, check, eval, sample, tiny, data, judge, report, convert, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    # transformers announces that torch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    gpu_memory.set_default(os.environ)
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    parser = make_parser()
    try:
        overrides = [a for a in arguments if a.startswith("--config.")]
        args = parser.parse_args([a for a in arguments if a not in overrides])
        if overrides and not hasattr(args, "config"):
            raise ValueError(f"{overrides[0]}: this verb takes no recipe")
        args.overrides = overrides
        return int(args.handler(args))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else errors.EXIT_USAGE
    except errors.Stopped as stop:
        print(f"speciarl: {stop}", file=sys.stderr)
        print(f"go on with: {goes_on(arguments, stop)}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except errors.EXPECTED as error:
        if is_debug:
            raise
        print(f"speciarl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return errors.exit_code(error)


def goes_on(arguments: Sequence[str], stop: errors.Stopped) -> str:
    """The command that takes up what a stopped one has left."""
    again = [a for a in arguments if not (stop.is_resumed and a == "--overwrite")]
    if stop.is_resumed and not any(a.partition("=")[0] == "--resume" for a in again):
        again.append("--resume")
    return shlex.join(["speciarl", *again])


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="speciarl",
        description=(__doc__ or "").splitlines()[0],
        epilog="--debug on any verb shows the whole traceback of an error",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for page in PAGES:
        page.register(verbs)
    return parser
