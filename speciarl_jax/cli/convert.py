"""`speciarl convert | export | parity`: parse, call, print.

Handlers import what they call: orbax and flax take seconds that other verbs should not pay.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from speciarl_jax.cli.flags import Verbs


def register(subparsers: Verbs) -> None:
    """Adds the verbs `convert`, `export` and `parity`."""
    convert = subparsers.add_parser(
        "convert", help="Hugging Face directory to an Orbax one, which loads to any sharding"
    )
    convert.add_argument("hf_dir", help="directory or hub id")
    convert.add_argument("out", type=pathlib.Path)
    convert.set_defaults(handler=run_convert)

    export = subparsers.add_parser("export", help="converted directory or run to HF or PEFT format")
    export.add_argument("directory", type=pathlib.Path, help="converted directory or run")
    export.add_argument("out", type=pathlib.Path)
    export.add_argument("--to", choices=("hf", "peft"), required=True)
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="hf: default as stored")
    export.add_argument(
        "--base_name", help="peft: base model as PEFT shall find it; default the directory"
    )
    export.set_defaults(handler=run_export)

    parity = subparsers.add_parser("parity", help="compare with transformers (needs torch)")
    parity.add_argument("hf_dir", help="directory or hub id, for transformers and for our port")
    parity.add_argument("--candidate", help="what our port loads instead: HF or converted")
    parity.add_argument("--image", type=pathlib.Path, action="append", default=[])
    parity.add_argument("--tolerance", type=float, default=1e-4)
    parity.add_argument("--greedy", type=int, default=64, help="tokens to generate")
    parity.add_argument("--json", action="store_true")
    parity.set_defaults(handler=run_parity_command)


def run_convert(args: argparse.Namespace) -> int:
    """Writes parameters in the checkpoint's own dtype, configuration, tokenizer and processor.

    Raises:
        ValueError: a bad checkpoint, or an output directory that is not empty.
    """
    import jax.numpy as jnp

    from speciarl_jax.convert.export import copy_side_files
    from speciarl_jax.convert.loading import checkpoint_dtype, load_policy, resolve_checkpoint
    from speciarl_jax.convert.orbax_dir import save_params
    from speciarl_jax.policy.layers import Dtypes

    source, out = resolve_checkpoint(args.hf_dir), args.out
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; give a new directory")
    dtype = jnp.dtype(checkpoint_dtype(source))
    policy = load_policy(source, Dtypes(param=dtype))
    out.mkdir(parents=True, exist_ok=True)
    save_params(policy, out)
    copy_side_files(source, out)
    print(f"{out}: {dtype.name} parameters and the model's other files")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Writes Hugging Face safetensors (adapter merged) or a PEFT adapter.

    Raises:
        ValueError: the directory is neither converted nor a run, or has no adapter to write.
    """
    import jax.numpy as jnp

    from speciarl_jax.convert.adapter import save_peft
    from speciarl_jax.convert.export import save_hf
    from speciarl_jax.convert.loading import load_policy
    from speciarl_jax.convert.orbax_dir import is_converted, stored_dtype
    from speciarl_jax.policy.layers import Dtypes
    from speciarl_jax.run.restore import load_run

    directory = args.directory
    lora = None
    if is_converted(directory):
        dtype = stored_dtype(directory)
        policy, base = load_policy(directory, Dtypes(param=jnp.dtype(dtype))), directory
    elif (directory / "checkpoints").is_dir():
        policy, lora, base = load_run(directory)
        dtype = policy.text.embedding.dtype.name
    else:
        raise ValueError(
            f"{directory}: neither a directory that `speciarl convert` wrote nor a run with "
            "checkpoints"
        )
    if args.to == "hf":
        save_hf(policy, base, args.out, args.dtype or dtype)
    elif lora is None:
        raise ValueError(f"{directory}: has no adapter; export with --to=hf")
    else:
        save_peft(policy, lora, args.base_name or str(base), args.out)
    print(f"{args.out}: written")
    return 0


def run_parity_command(args: argparse.Namespace) -> int:
    """Prints the comparison; 1 if anything is beyond tolerance.

    Raises:
        ValueError: torch is missing, or a checkpoint or image cannot be read.
    """
    from speciarl_jax.convert.parity.compare import run_parity

    report = run_parity(
        args.hf_dir,
        candidate=args.candidate,
        image_files=args.image,
        tolerance=args.tolerance,
        num_greedy=args.greedy,
    )
    print(json.dumps(report.to_json()) if args.json else report.summary())
    return report.exit_code
