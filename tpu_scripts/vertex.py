#!/usr/bin/env python3
"""Launches a recipe as a Vertex AI custom job.

    python tpu_scripts/vertex.py --project=P --region=us-west1 --image=IMAGE --bucket=gs://B \
        --accelerator=v5e --topology=2x2 --judge_url=http://HOST:8000/v1 \
        --eval_judge_url=http://HOST:8001/v1 \
        --config=configs/qwen2_5_vl_7b_v5e.py [--spot] [--dry_run] [-- --config.seed=1 ...]

The specification is built as plain data first: `--dry_run` prints it as JSON and needs neither
credentials nor google-cloud-aiplatform. Launching needs `pip install 'speciarl-jax[gcp]'` and
application default credentials. The image holds this repository, installed, in /app.
`DRY_RUN=1` in the environment is the same as `--dry_run`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

# accelerator: machine type and chips a machine.
TPU_MACHINES = {
    "v5e": ("ct5lp-hightpu-4t", 4),
    "v5p": ("ct5p-hightpu-4t", 4),
    "v6e": ("ct6e-standard-4t", 4),
}
# accelerator: machine type, Vertex's name of the accelerator, GPUs a machine.
GPU_MACHINES = {
    "a100": ("a2-ultragpu-8g", "NVIDIA_A100_80GB", 8),
    "h100": ("a3-highgpu-8g", "NVIDIA_H100_80GB", 8),
    "h200": ("a3-ultragpu-8g", "NVIDIA_H200_141GB", 8),
}


def machine_pool(accelerator: str, topology: str) -> tuple[dict[str, Any], int]:
    """The machine specification and how many machines.

    Args:
        accelerator: a key of `TPU_MACHINES` or `GPU_MACHINES`.
        topology: chips of a TPU slice, e.g. ``4x4``; 1 for GPUs.

    Raises:
        ValueError: unknown accelerator, a topology that does not fill whole machines, or several
            GPU machines.
    """
    if accelerator in GPU_MACHINES:
        machine_type, name, count = GPU_MACHINES[accelerator]
        spec = {
            "machine_type": machine_type,
            "accelerator_type": name,
            "accelerator_count": count,
        }
        if _positive(topology) != 1:
            raise ValueError(
                f"--topology={topology}: {accelerator} is launched on one machine only, because "
                "Vertex names no coordinator; set --topology=1, or use SLURM or GKE"
            )
        return spec, 1
    if accelerator not in TPU_MACHINES:
        known = ", ".join([*TPU_MACHINES, *GPU_MACHINES])
        raise ValueError(f"--accelerator={accelerator}: expected one of {known}")
    machine_type, chips = TPU_MACHINES[accelerator]
    total = math.prod(_positive(side) for side in topology.split("x"))
    if total % chips:
        raise ValueError(f"--topology={topology}: {total} chips do not fill machines of {chips}")
    return {"machine_type": machine_type, "tpu_topology": topology}, total // chips


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--topology={text!r}: expected sizes such as 4x4 (TPU) or 1 (GPU)")
    return int(text)


def job_spec(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything Vertex needs, as plain data.

    Returns:
        ``display_name``, ``worker_pool_specs``, ``scheduling`` and ``service_account`` as the REST
        CustomJob has them, ready for JSON.
    """
    machine, num_hosts = machine_pool(args.accelerator, args.topology)
    workdir = f"{args.bucket.rstrip('/')}/runs/{args.name}"
    container = {
        "image_uri": args.image,
        "command": ["/app/tpu_scripts/restart.sh", workdir],
        "args": [
            f"--config={args.config}",
            f"--config.judge.endpoints=('{args.judge_url}',)",
            f"--config.eval.judge.endpoints=('{args.eval_judge_url}',)",
            f"--config.compile_cache_dir={args.bucket.rstrip('/')}/runs/xla-cache",
            *(["--cluster"] if num_hosts > 1 else []),
            *overrides,
        ],
    }
    # One pool: a TPU slice, whose hosts Vertex derives from the topology, or one GPU machine.
    pool = {"machine_spec": machine, "replica_count": 1, "container_spec": container}
    return {
        "display_name": args.name,
        "worker_pool_specs": [pool],
        "scheduling": {
            "strategy": "SPOT" if args.spot else "STANDARD",
            "restart_job_on_worker_restart": True,
            "timeout": f"{args.timeout_h * 3600}s",
        },
        "service_account": args.service_account,
    }


def launch(spec: dict[str, Any], project: str, region: str, bucket: str) -> None:
    """Submits the job and returns when Vertex has accepted it.

    Raises:
        ValueError: google-cloud-aiplatform is not installed.
    """
    try:
        from google.cloud import aiplatform
        from google.cloud.aiplatform_v1.types import Scheduling
    except ImportError as error:
        raise ValueError(
            f"{error}: launching needs google-cloud-aiplatform; "
            "pip install 'speciarl-jax[gcp]', or use --dry_run"
        ) from error
    aiplatform.init(project=project, location=region, staging_bucket=bucket)
    job = aiplatform.CustomJob(
        display_name=spec["display_name"], worker_pool_specs=spec["worker_pool_specs"]
    )
    scheduling = spec["scheduling"]
    job.submit(
        service_account=spec["service_account"] or None,
        timeout=int(scheduling["timeout"].rstrip("s")),
        restart_job_on_worker_restart=scheduling["restart_job_on_worker_restart"],
        scheduling_strategy=Scheduling.Strategy[scheduling["strategy"]],
    )
    print(f"{job.resource_name}: submitted")


def make_parser() -> argparse.ArgumentParser:
    """Flags of the launcher; what follows ``--`` goes to the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", required=True, help="Google Cloud project")
    parser.add_argument("--region", required=True, help="of the job")
    parser.add_argument("--image", required=True, help="container image, /app holds this package")
    parser.add_argument("--bucket", required=True, help="gs://BUCKET for runs and staging")
    parser.add_argument("--accelerator", required=True, help="v5e, v5p, v6e, a100, h100 or h200")
    parser.add_argument("--topology", required=True, help="TPU: chips, 4x4; GPU: 1")
    parser.add_argument("--judge_url", required=True, help="OpenAI-compatible judge endpoint")
    parser.add_argument("--eval_judge_url", required=True, help="endpoint of the judge that scores")
    parser.add_argument("--config", required=True, help="recipe inside the image")
    parser.add_argument("--name", default="speciarl", help="of the job and its run directory")
    parser.add_argument("--service_account", default="", help="run as; empty for the default")
    parser.add_argument("--timeout_h", type=int, default=72, help="hours until Vertex stops it")
    parser.add_argument("--spot", action="store_true", help="spot capacity")
    parser.add_argument("--dry_run", action="store_true", help="print the specification")
    parser.add_argument("overrides", nargs="*", help="-- --config.section.field=value ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or submits the job; 2 on bad usage."""
    args = make_parser().parse_args(argv)
    try:
        if not args.bucket.startswith("gs://"):
            raise ValueError(f"--bucket={args.bucket}: expected gs://BUCKET")
        spec = job_spec(args, args.overrides)
        if args.dry_run or os.environ.get("DRY_RUN") == "1":
            print(json.dumps(spec, indent=1))
        else:
            launch(spec, args.project, args.region, args.bucket)
    except ValueError as error:
        print(f"vertex.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
