"""`speciarl train`."""

from __future__ import annotations

import argparse

from speciarl_jax.cli.flags import Verbs, add_config, add_processes, join_job
from speciarl_jax.config.recipes import load_recipe


def register(verbs: Verbs) -> None:
    """Adds the verb `train`."""
    train = verbs.add_parser("train", help="train a recipe")
    add_config(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=["auto"],
        help="go on with the run in --workdir; --resume=auto: if there is one, else start it",
    )
    train.add_argument("--overwrite", action="store_true", help="delete the run in --workdir first")
    train.add_argument(
        "--new_judge",
        action="store_true",
        help="with --resume: go on although the judge, its model or its prompt is another one",
    )
    train.add_argument(
        "--profile", default="", help="steps=FIRST:LAST: XProf trace in WORKDIR/profile"
    )
    add_processes(train)
    train.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """`speciarl train`: what `speciarl check` asks, then the run."""
    from speciarl_jax import train
    from speciarl_jax.monitor import watch
    from speciarl_jax.run.alike import failing_together
    from speciarl_jax.run.preflight import preflight

    config, recipe_dir = load_recipe(args.config, args.overrides)
    profile = watch.parse_profile(args.profile)
    join_job(args, config)
    with failing_together():
        for _ in preflight(config, args.workdir, recipe_dir):
            pass  # told by `speciarl check`; here only what is wrong
    train.main(
        config,
        args.workdir,
        resume=args.resume,
        overwrite=args.overwrite,
        new_judge=args.new_judge,
        recipe_dir=recipe_dir,
        profile=profile,
    )
    return 0
