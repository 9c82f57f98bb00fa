"""Compile time and step time of a deep language model against a shallow one: the scan pays.

    python tests/benchmarks/bench_depth.py [--depths 4 28] [--width 256] [--repeats 5]

Prints one JSON object. The step is forward and backward of the mean log-likelihood of 4 x 128
tokens with respect to a rank-8 adapter. Compile time should hardly grow with depth; step time
should grow in proportion. Ratios are of processor time, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, PolicyParts, split_policy

BATCH, LENGTH = 4, 128


def make_parts(depth: int, width: int) -> PolicyParts:
    """A random policy of `depth` layers with an adapter, taken apart."""
    head_dim = width // 4
    arch = Arch(
        vision=VisionArch(1, 32, 32, 2, width, ()),
        text=TextArch(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=4 * width,
            num_layers=depth,
            num_heads=4,
            num_kv_heads=2,
            mrope_section=(head_dim // 8, head_dim // 8, head_dim // 4),
        ),
    )
    policy = Policy(arch, dtypes=Dtypes(), rngs=nnx.Rngs(0))
    add_lora(policy, LoraConfig(rank=8, alpha=16.0), seed=0)
    return split_policy(policy)


def measure(depth: int, width: int, repeats: int) -> dict[str, object]:
    """Seconds to trace, to compile, per step: by the clock, and of processor time."""
    parts = make_parts(depth, width)
    tokens = np.random.default_rng(0).integers(0, 1024, (BATCH, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, 3, LENGTH))
    lengths = np.full(BATCH, LENGTH, np.int32)

    def loss(trainable: nnx.State, frozen: nnx.State) -> jax.Array:
        policy = nnx.merge(parts.graphdef, trainable, frozen)
        logits = policy.text.logits(policy.hidden_states(tokens, positions, lengths))
        chosen = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(chosen, tokens[:, 1:, None], axis=-1))

    start, cpu_start = time.perf_counter(), time.process_time()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(parts.trainable, parts.frozen)
    traced, cpu_traced = time.perf_counter(), time.process_time()
    step = lowered.compile()
    compiled, cpu_compiled = time.perf_counter(), time.process_time()
    jax.block_until_ready(step(parts.trainable, parts.frozen))
    seconds, cpu_steps = [], time.process_time()
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(step(parts.trainable, parts.frozen))
        seconds.append(time.perf_counter() - begin)
    cpu_done = time.process_time()
    return {
        "depth": depth,
        "trace_s": round(traced - start, 3),
        "compile_s": round(compiled - traced, 3),
        "cpu": {
            "trace_s": round(cpu_traced - cpu_start, 3),
            "compile_s": round(cpu_compiled - cpu_traced, 3),
            "step_s": round((cpu_done - cpu_steps) / repeats, 4),
        },
        "step_s": {
            "median": round(statistics.median(seconds), 4),
            "min": round(min(seconds), 4),
            "max": round(max(seconds), 4),
        },
    }


def main() -> None:
    """Measures every depth and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    measure(1, args.width, 1)  # first use of everything
    rows = [measure(depth, args.width, args.repeats) for depth in args.depths]
    shallow, deep = rows[0], rows[-1]
    result = {
        "benchmark": "depth",
        "commit": commit,
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "width": args.width,
        "tokens": BATCH * LENGTH,
        "rows": rows,
        "compile_ratio": round(deep["cpu"]["compile_s"] / shallow["cpu"]["compile_s"], 2),
        "step_ratio": round(deep["cpu"]["step_s"] / shallow["cpu"]["step_s"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
