"""`speciarl tiny`: makes the shipped small policy."""

from __future__ import annotations

import argparse
import pathlib

from speciarl_jax.cli.flags import Verbs


def register(verbs: Verbs) -> None:
    """Adds the verb `tiny`."""
    tiny = verbs.add_parser("tiny", help="make the shipped small policy (see `make tiny`)")
    steps = tiny.add_subparsers(dest="tiny_verb", required=True)
    init = steps.add_parser("init", help="tokenizer, config and random weights")
    init.add_argument("out", type=pathlib.Path)
    init.add_argument("--seed", type=int, default=0, help="of the weights")
    init.set_defaults(handler=run_tiny_init)
    ship = steps.add_parser("ship", help="export a finished warm-up as an HF directory, bf16")
    ship.add_argument("workdir", type=pathlib.Path, help="run of configs/tiny_sft.py")
    ship.add_argument("--out", required=True, type=pathlib.Path)
    ship.set_defaults(handler=run_tiny_ship)


def run_tiny_init(args: argparse.Namespace) -> int:
    """`speciarl tiny init`: nothing is done if the directory holds a model already."""
    from speciarl_jax.convert import tiny
    from speciarl_jax.data.prompts import PromptTemplate

    if (args.out / "config.json").is_file():
        print(f"{args.out}: kept as it is")
        return 0
    prompts = [PromptTemplate.load(name).texts[0] for name in tiny.PROMPTS]
    tiny.make_tiny_dir(args.out, prompts, args.seed)
    return 0


def run_tiny_ship(args: argparse.Namespace) -> int:
    """`speciarl tiny ship`."""
    from speciarl_jax.convert.export import save_hf
    from speciarl_jax.run.restore import load_run

    policy, _, base = load_run(args.workdir)
    save_hf(policy, base, args.out, "bfloat16")
    print(f"{args.out}: Hugging Face directory of the warmed-up policy")
    return 0
