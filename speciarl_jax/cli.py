"""`speciarl <verb>`: parses and calls; errors become one line and an exit code.

0 done, 1 failed, 2 bad usage, 75 stopped by pre-emption and saved.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from speciarl_jax import presets
from speciarl_jax.config import Config
from speciarl_jax.convert.commands import LoadedRun
from speciarl_jax.types import Verbs

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    # transformers announces that torch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
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
        return error.code if isinstance(error.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except _expected_errors() as error:
        if is_debug:
            raise
        print(f"speciarl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _exit_code(error)


def _expected_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message is written for the user."""
    from speciarl_jax.judge.base import JudgeError

    known: list[type[BaseException]] = [ValueError, JudgeError, OSError]
    if "speciarl_jax.train" in sys.modules:
        from speciarl_jax.train import Preempted, TrainingStopped

        known += [Preempted, TrainingStopped]
    return tuple(known)


def _exit_code(error: BaseException) -> int:
    if type(error).__name__ == "Preempted":
        return EXIT_PREEMPTED
    return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from speciarl_jax.convert import commands as convert_commands
    from speciarl_jax.data import commands as data_commands
    from speciarl_jax.judge import commands as judge_commands
    from speciarl_jax.plan import commands as plan_commands
    from speciarl_jax.report import commands as report_commands

    parser = argparse.ArgumentParser(
        prog="speciarl",
        description=__doc__.splitlines()[0],
        epilog="--debug on any verb shows the whole traceback of an error",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_train(verbs)
    _add_eval(verbs)
    _add_sample(verbs)
    _add_tiny(verbs)
    for room in (data_commands, judge_commands, report_commands):
        room.register(verbs)
    convert_commands.register(verbs, _load_run)
    plan_commands.register(verbs, load_recipe)
    return parser


def _workdir(text: str) -> pathlib.Path | str:
    """A folder; an address such as gs://bucket/run stays text, for pathlib would mangle it."""
    return text if "://" in text else pathlib.Path(text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        help="recipe: PATH.py or PATH.py:ARGUMENT; --config.section.field=value overrides",
    )
    parser.add_argument("--workdir", required=True, type=_workdir, help="run directory")


def _add_train(verbs: Verbs) -> None:
    train = verbs.add_parser("train", help="train a recipe")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on with the run in --workdir")
    train.add_argument("--overwrite", action="store_true", help="delete the run in --workdir first")
    train.add_argument(
        "--profile", default="", help="steps=FIRST:LAST: XProf trace in WORKDIR/profile"
    )
    _add_processes(train)
    train.set_defaults(handler=run_train)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    processes = parser.add_argument_group(
        "several processes", "one per host; each flag may come from SPECIARL_<NAME> instead"
    )
    processes.add_argument("--coordinator", help="HOST:PORT of process 0")
    processes.add_argument("--num_processes", type=int, help="of the job")
    processes.add_argument("--process_id", type=int, help="of this process, from 0")
    processes.add_argument(
        "--cluster", action="store_true", help="find the others on a TPU pod, GKE, SLURM or MPI"
    )


def _add_eval(verbs: Verbs) -> None:
    evaluate = verbs.add_parser("eval", help="score a checkpoint, or predictions that exist")
    _add_config(evaluate)
    _add_processes(evaluate)
    evaluate.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, a step of --workdir, base, an HF directory or a PEFT adapter directory",
    )
    evaluate.add_argument("--samples", type=int, default=0, help="answers per image")
    evaluate.add_argument("--predictions", default="", help="score this JSONL file instead")
    evaluate.add_argument(
        "--text_metrics", action="store_true", help="also score the words, without a judge"
    )
    evaluate.add_argument(
        "--text_model",
        default="",
        help="similarity for --text_metrics: minilm, or a sentence model's directory",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    evaluate.set_defaults(handler=run_eval)


def _add_sample(verbs: Verbs) -> None:
    sample = verbs.add_parser("sample", help="try a policy by hand on one image")
    sample.add_argument("--model", default="tiny", help="HF directory or hub id")
    sample.add_argument("--image", required=True, type=pathlib.Path, help="image file")
    sample.add_argument("--prompt", default="", help="prompt name or file; default: by model")
    sample.add_argument("--n", type=int, default=1, help="answers")
    sample.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    sample.add_argument("--max_tokens", type=int, default=512, help="completion limit, tokens")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(handler=run_sample)


def _add_tiny(verbs: Verbs) -> None:
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


def load_recipe(path: str, overrides: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """Loads ``PATH.py[:ARGUMENT]`` and applies ``--config.a.b=value`` overrides.

    An override of ``algo.name`` brings the algorithm's preset, which comes between the recipe and
    the other overrides; a line on standard error says what it set.

    Returns:
        (config, folder of the recipe).

    Raises:
        ValueError: no such file, no get_config in it, an unknown field or a value of another type.
    """
    names = [word for word in overrides if word.startswith(_ALGORITHM)]
    name = names[-1].removeprefix(_ALGORITHM) if names else ""
    if name in presets.ALGORITHMS:
        others = [word for word in overrides if word not in names]
        fields = presets.change_of_algorithm(_load(path, []), _load(path, others), name)
        config = _load(path, [*(f"--config.algo.{k}={v}" for k, v in fields.items()), *others])
        kept = {k: v for k, v in fields.items() if k != "name" and getattr(config.algo, k) == v}
        if kept:
            shown = ", ".join(f"{k}={v}" for k, v in kept.items())
            print(f"algo.name={name} sets in algo: {shown}", file=sys.stderr)
    else:
        config = _load(path, overrides)
    return config, pathlib.Path(path.partition(":")[0]).resolve().parent


_ALGORITHM = "--config.algo.name="


def _load(path: str, overrides: Sequence[str]) -> Config:
    """The recipe with overrides, the last of a field wins."""
    from absl import flags
    from ml_collections import config_flags

    if not pathlib.Path(path.partition(":")[0]).is_file():
        raise ValueError(f"--config={path}: no such recipe file")
    values = flags.FlagValues()
    words = ["speciarl", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, sys_argv=words)
    try:
        values(words)
        config: Config = values.config
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{' '.join(overrides)}: no such field ({error})") from error
    except (TypeError, flags.Error) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"--config={path} {' '.join(overrides)}: {reason}") from error
    return config


def run_train(args: argparse.Namespace) -> int:
    """`speciarl train`."""
    from speciarl_jax import train, watch

    config, recipe_dir = load_recipe(args.config, args.overrides)
    profile = watch.parse_profile(args.profile)
    join_job(args)
    train.main(
        config,
        args.workdir,
        resume=args.resume,
        overwrite=args.overwrite,
        recipe_dir=recipe_dir,
        profile=profile,
    )
    return 0


def join_job(args: argparse.Namespace) -> None:
    """Joins a job of several processes if the flags, or SPECIARL_* variables, name one.

    Raises:
        ValueError: see `hosts.connect`.
    """
    from speciarl_jax import hosts

    names = {"coordinator": str, "num_processes": int, "process_id": int}
    given = {}
    for name, parse in names.items():
        value = getattr(args, name)
        text = os.environ.get(f"SPECIARL_{name.upper()}")
        if value is None and text is not None:
            try:
                value = parse(text)
            except ValueError as error:
                raise ValueError(f"SPECIARL_{name.upper()}={text!r}: expected a number") from error
        given[name] = value
    if args.cluster or any(value is not None for value in given.values()):
        hosts.connect(**given)


def run_eval(args: argparse.Namespace) -> int:
    """`speciarl eval`."""
    from speciarl_jax import eval_command

    config, recipe_dir = load_recipe(args.config, args.overrides)
    options = eval_command.EvalOptions(
        checkpoint=args.checkpoint,
        samples=args.samples,
        predictions=args.predictions,
        has_text_metrics=args.text_metrics,
        text_model=args.text_model,
        is_json=args.json,
    )
    join_job(args)
    return eval_command.run(config, args.workdir, options, recipe_dir)


def run_sample(args: argparse.Namespace) -> int:
    """`speciarl sample`."""
    from speciarl_jax import sample_command

    return sample_command.run(
        args.model,
        args.image,
        prompt=args.prompt,
        num_answers=args.n,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def run_tiny_init(args: argparse.Namespace) -> int:
    """`speciarl tiny init`: nothing is done if the directory holds a model already."""
    from speciarl_jax import tiny
    from speciarl_jax.data.prompts import PromptTemplate

    if (args.out / "config.json").is_file():
        print(f"{args.out}: kept as it is")
        return 0
    prompts = [PromptTemplate.load(name).texts[0] for name in tiny.PROMPTS]
    tiny.make_tiny_dir(args.out, prompts, args.seed)
    return 0


def _load_run(workdir: pathlib.Path) -> LoadedRun:
    from speciarl_jax.export_run import load_run

    return load_run(workdir)


def run_tiny_ship(args: argparse.Namespace) -> int:
    """`speciarl tiny ship`."""
    from speciarl_jax.convert.export import save_hf

    policy, _, base = _load_run(args.workdir)
    save_hf(policy, base, args.out, "bfloat16")
    print(f"{args.out}: Hugging Face directory of the warmed-up policy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
