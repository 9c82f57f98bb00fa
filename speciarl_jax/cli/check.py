"""`speciarl check`: would this recipe run here? Asked without loading the model."""

from __future__ import annotations

import argparse

from speciarl_jax.cli.flags import Verbs, add_recipe, parse_workdir
from speciarl_jax.config.recipes import load_recipe


def register(verbs: Verbs) -> None:
    """Adds the verb `check`."""
    check = verbs.add_parser("check", help="whether a recipe would run here; loads no model")
    add_recipe(check)
    check.add_argument("--workdir", type=parse_workdir, help="asked whether it can be written")
    check.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each thing that is right; the first that is not ends it.

    Raises:
        ValueError: see `run.preflight.preflight`.
        JudgeError: nobody answers.
    """
    from speciarl_jax.run.preflight import preflight

    config, recipe_dir = load_recipe(args.config, args.overrides)
    for line in preflight(config, args.workdir, recipe_dir):
        print(line, flush=True)
    return 0
