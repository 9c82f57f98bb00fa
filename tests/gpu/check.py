"""What a real card does, against what the plan says of it: one command, at most ten minutes.

    make gpu-check                     (or: python -m tests.gpu.check [--out=DIR] [--only=update])
    make gpu-check ARGS=--tiny         the same sections with the small policy, on what there is

Each section is a process of its own with a time limit, so that a crash or a hang costs one section,
and none finds the memory taken: this process opens no device. Prints a table on standard error and
one JSON object on standard output, which is also in DIR/gpu_check.json. Exit code 1 if a section
failed or a figure is out of its bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from speciarl_jax.devices import gpu_memory

ROOT = pathlib.Path(__file__).parents[2]
BUDGET_S = 570.0
SLOW = 4  # times longer with --tiny: that is for a CPU, which may be busy with other things
# Section and its limit in seconds, in this order; one whose time has run out is left out.
SECTIONS = {
    "device": 60.0,
    "attention": 120.0,
    "sampler": 60.0,
    "decode": 150.0,
    "update": 150.0,
    "smoke": 150.0,
    "resume": 150.0,
}
# Figure: (least, most). Errors are of bfloat16 against float32, relative in the 2-norm; a kernel
# rounds where the plain form does, so twice its error is a fault and not a rounding.
BOUNDS = {
    "attention/causal_forward_vs_plain": (0.0, 2.0),
    "attention/causal_grads_vs_plain": (0.0, 2.0),
    "attention/group_forward_vs_plain": (0.0, 2.0),
    "attention/group_grads_vs_plain": (0.0, 2.0),
    "attention/image_forward_vs_plain": (0.0, 2.0),
    "attention/image_grads_vs_plain": (0.0, 2.0),
    "sampler/distance_over_expected": (0.0, 2.0),
    "sampler/outside_top_p": (0.0, 0.0),
    "sampler/logprob_error": (0.0, 1e-4),
    "decode/peak_over_plan": (0.0, 1.1),
    "update/peak_over_plan": (0.0, 1.1),
    "smoke/steps": (2.0, 2.0),
    "smoke/mismatch_mean": (0.0, 0.05),
    "resume/steps": (4.0, 4.0),
    "resume/largest_difference": (0.0, 0.02),
}

Figures = dict[str, float | str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu_check"))
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="the small policy")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    gpu_memory.set_default(os.environ)
    start, found = time.monotonic(), {}
    for name in args.only:
        slow = SLOW if args.tiny else 1
        limit = min(SECTIONS[name] * slow, args.budget_s * slow - (time.monotonic() - start))
        found[name] = run_section(name, limit, args.out, args.tiny) if limit > 5 else {}
        print(table(name, found[name]), file=sys.stderr, flush=True)
    faults = out_of_bounds(found)
    result = {"sections": found, "faults": faults, "wall_s": round(time.monotonic() - start, 1)}
    (args.out / "gpu_check.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return bool(faults)


def run_section(name: str, limit_s: float, out: pathlib.Path, is_tiny: bool) -> Figures:
    """Figures of a section; with ``error`` if it failed, those that it printed before included."""
    start, log = time.monotonic(), out / f"{name}.log"
    command = [sys.executable, "-m", "tests.gpu.sections", name, str(out)]
    with log.open("w") as noise:
        process = subprocess.Popen(
            [*command, "--tiny"] if is_tiny else command,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"},  # the last line says the error
        )
        try:
            text, _ = process.communicate(timeout=limit_s)
            error = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            error = f"no end within {limit_s:.0f} s"
    figures: Figures = {"wall_s": round(time.monotonic() - start, 1)}
    for line in filter(None, text.splitlines()):
        figures |= json.loads(line)
    if error:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["(no output)"]
        figures["error"] = f"{error}: {last[0][:300]}; see {log}"
    return figures


def out_of_bounds(found: dict[str, Figures]) -> list[str]:
    """One line for each section that failed or is missing, and each figure out of its bounds."""
    faults = []
    for section, figures in found.items():
        if not figures:
            faults.append(f"{section}: no time was left; run it by itself with --only {section}")
        elif "error" in figures:
            faults.append(f"{section}: {figures['error']}")
        for path, (least, most) in BOUNDS.items():
            room, _, name = path.partition("/")
            value = figures.get(name)
            if room == section and isinstance(value, float | int) and not least <= value <= most:
                faults.append(f"{path}={value:g}: expected {least:g} to {most:g}")
    return faults


def table(name: str, figures: Figures) -> str:
    """A section as aligned lines."""
    width = max(map(len, figures), default=0)
    lines = [
        f"  {key.ljust(width)}  {value:.4g}"
        if isinstance(value, float)
        else f"  {key.ljust(width)}  {value}"
        for key, value in figures.items()
    ]
    return "\n".join([name, *lines])


if __name__ == "__main__":
    sys.exit(main())
