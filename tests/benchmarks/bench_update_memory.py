"""Memory and work of the update at the 7B shape: shared-prefix tree against N full sequences.

    python tests/benchmarks/bench_update_memory.py [--layers 28] [--repeats 5]

Prints one JSON object. One group of N = 10 completions of 128 tokens on a prompt of 300 is one
micro-batch; base in bfloat16, float32 LoRA of rank 64, rematerialisation as in
configs/qwen2_5_vl_7b_cub.py (`full`: each layer keeps its input). Both sides are forward and
backward of the same loss by this package's own layers:

    tree    `update.batch_loss`
    naive   N sequences [prompt, completion] through the plain causal forward, the head on
            completion tokens only; log-probs in one piece, and in the tree's chunks

Vision is left out (image embeddings are given). Nothing of 7B's size is allocated: the programs are
compiled from shapes for the CPU, and XLA's buffer assignment is read. `temp` is what the program
allocates besides arguments and results; `arguments` are base, adapter and batch, the same for both
sides. Results, the adapter's gradients, are the same too. Times are of a small shape, on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from speciarl_jax import flops
from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config import LoraConfig
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, PolicyParts, split_policy
from speciarl_jax.update import LossConfig, TrainBatch, batch_loss, token_logprobs

PROMPT, GROUP, COMPLETION, IMAGE = 300, 10, 128, 256  # tokens; answers; tokens; image tokens
SETTINGS = LossConfig(remat="full")


def large_arch(num_layers: int) -> Arch:
    """Qwen2.5-VL-7B's language model with so many layers, and the smallest tower."""
    text = TextArch(152_064, 3584, 18_944, num_layers, 28, 4, (16, 24, 24))
    return Arch(vision=VisionArch(1, 16, 16, 2, text.hidden_size, ()), text=text)


def small_arch() -> Arch:
    """A shape whose update takes seconds on one core."""
    text = TextArch(4096, 256, 1024, 4, 4, 2, (8, 12, 12))
    return Arch(vision=VisionArch(1, 16, 16, 2, text.hidden_size, ()), text=text)


def make_policy(arch: Arch, dtypes: Dtypes, rank: int) -> Policy:
    """A random policy with an adapter."""
    policy = Policy(arch, dtypes=dtypes, rngs=nnx.Rngs(0))
    add_lora(policy, LoraConfig(rank=rank, alpha=rank / 2), seed=0)
    return policy


def make_batch(arch: Arch, dtype: Any) -> TrainBatch:
    """One group: text, an image's tokens, text; full-length completions."""
    rng = np.random.default_rng(0)
    rows = np.full((1, PROMPT), -1, np.int32)
    rows[0, 10 : 10 + IMAGE] = np.arange(IMAGE)
    group = (1, GROUP, COMPLETION)
    return TrainBatch(
        tokens=rng.integers(0, 4096, (1, PROMPT), dtype=np.int32),
        prompt_lengths=np.full(1, PROMPT, np.int32),
        positions=np.tile(np.arange(PROMPT, dtype=np.int32), (1, 3, 1)),
        next_position=np.full(1, PROMPT, np.int32),
        image_rows=rows,
        images=rng.normal(size=(1, IMAGE, arch.text.hidden_size)).astype(dtype),
        completions=rng.integers(0, 4096, group, dtype=np.int32),
        weights=np.full(group, 1 / (GROUP * COMPLETION), np.float32),
        advantages=rng.normal(size=(1, GROUP)).astype(np.float32),
    )


Loss = Callable[[Policy, TrainBatch, Array], Array]


def tree_loss(policy: Policy, batch: TrainBatch, banned: Array) -> Array:
    """The package's own."""
    return batch_loss(policy, batch, banned, SETTINGS)[0]


def naive_loss(chunk_tokens: int) -> Loss:
    """The same number from N full sequences; `chunk_tokens` rows of logits exist at once."""
    settings = dataclasses.replace(SETTINGS, logprob_chunk_tokens=chunk_tokens)

    def loss(policy: Policy, batch: TrainBatch, banned: Array) -> Array:
        own = batch.next_position[:, None] + jnp.arange(COMPLETION)[None]
        ids = jnp.concatenate([batch.positions, jnp.tile(own[:, None], (1, 3, 1))], axis=2)
        tokens = jnp.concatenate(
            [jnp.repeat(batch.tokens, GROUP, axis=0), batch.completions[0]], axis=1
        )
        rows = jnp.pad(batch.image_rows, ((0, 0), (0, COMPLETION)), constant_values=-1)
        hidden = policy.hidden_states(
            tokens,
            jnp.repeat(ids, GROUP, axis=0),
            jnp.full(GROUP, PROMPT + COMPLETION),
            jnp.repeat(rows, GROUP, axis=0),
            batch.images[0],
            SETTINGS.remat,
        )
        predicting = hidden[None, :, PROMPT - 1 : -1]
        logprobs, _ = token_logprobs(policy.text, predicting, batch.completions, banned, settings)
        ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
        return -jnp.sum(batch.weights * batch.advantages[..., None] * ratio)

    return loss


SIDES = {
    "tree": tree_loss,
    "naive": naive_loss(GROUP * COMPLETION),
    "naive_chunked": naive_loss(SETTINGS.logprob_chunk_tokens),
}


def gradient(parts: PolicyParts, loss: Loss) -> Callable[..., Any]:
    """Jitted loss and gradient by the adapter, of (trainable, frozen, batch, banned)."""

    def value(trainable: nnx.State, frozen: nnx.State, batch: TrainBatch, banned: Array) -> Array:
        return loss(nnx.merge(parts.graphdef, trainable, frozen), batch, banned)

    return jax.jit(jax.value_and_grad(value))


def compiled_memory(num_layers: int) -> dict[str, Any]:
    """MiB of each side's program at 7B's width; share of the naive ones."""
    arch = large_arch(num_layers)
    dtypes = Dtypes(jnp.bfloat16, jnp.bfloat16)
    parts = split_policy(nnx.eval_shape(lambda: make_policy(arch, dtypes, rank=64)))
    batch = make_batch(arch, jnp.bfloat16)
    banned = jax.ShapeDtypeStruct((arch.text.vocab_size,), bool)
    found = {}
    for name, loss in SIDES.items():
        lowered = gradient(parts, loss).lower(parts.trainable, parts.frozen, batch, banned)
        stats = lowered.compile().memory_analysis()
        found[name] = {
            "temp_mb": round(stats.temp_size_in_bytes / 2**20),
            "arguments_mb": round(stats.argument_size_in_bytes / 2**20),
            "results_mb": round(stats.output_size_in_bytes / 2**20),
        }
    tree = found["tree"]
    for name in ("naive", "naive_chunked"):
        naive = found[name]
        totals = [sum(side.values()) for side in (tree, naive)]
        found[f"tree_share_of_{name}"] = {
            "temp": round(tree["temp_mb"] / naive["temp_mb"], 3),
            "temp_arguments_results": round(totals[0] / totals[1], 3),
        }
    return found


def flops_share(num_layers: int) -> dict[str, float]:
    """Analytic TFLOP of forward, backward and recomputation, and the tree's share."""
    arch = large_arch(num_layers)
    text = arch.text
    kv_width = text.num_kv_heads * text.head_dim
    sides = 6 * text.hidden_size + 2 * kv_width + 3 * (text.hidden_size + text.intermediate_size)
    training = flops.Training(adapter_params=64 * num_layers * sides, remat="full")
    no_images = np.zeros((0, 1), int)
    tree = flops.count_tokens(np.full(1, PROMPT), np.full((1, GROUP), COMPLETION), no_images)
    naive = flops.count_tokens(np.full(GROUP, PROMPT), np.full((GROUP, 1), COMPLETION), no_images)
    totals = [flops.update_hardware_flops(arch, counts, training) for counts in (tree, naive)]
    return {
        "tree_tflop": round(1e-12 * totals[0], 1),
        "naive_tflop": round(1e-12 * totals[1], 1),
        "tree_share_of_naive": round(totals[0] / totals[1], 3),
    }


def measured_time(repeats: int) -> dict[str, Any]:
    """Seconds of both sides at the small shape, float32, one core.

    Raises:
        RuntimeError: their losses differ.
    """
    arch = small_arch()
    parts = split_policy(make_policy(arch, Dtypes(), rank=16))
    batch = jax.device_put(make_batch(arch, np.float32))
    banned = jnp.zeros(arch.text.vocab_size, bool)
    runs = {}
    for name in ("tree", "naive_chunked"):
        program = gradient(parts, SIDES[name])
        runs[name] = lambda f=program: jax.block_until_ready(
            f(parts.trainable, parts.frozen, batch, banned)
        )
    losses = {name: float(run()[0]) for name, run in runs.items()}
    if not np.isclose(losses["tree"], losses["naive_chunked"], rtol=1e-4):
        raise RuntimeError(f"losses differ: {losses}; expected within 1e-4")
    seconds = harness.interleaved(runs, repeats)
    return {
        **{name: harness.summary(times) for name, times in seconds.items()},
        "speedup": harness.ratio(seconds["naive_chunked"], seconds["tree"]),
    }


def main() -> None:
    """Compiles, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    harness.use_one_core()
    result = {
        "benchmark": "update_memory",
        "shape": f"7B width, {args.layers} layers, prompt {PROMPT}, {GROUP} x {COMPLETION} tokens",
        "remat": SETTINGS.remat,
        "logprob_chunk_tokens": SETTINGS.logprob_chunk_tokens,
        "memory": compiled_memory(args.layers),
        "flops": flops_share(args.layers),
        "time_small_shape": measured_time(args.repeats),
    }
    print(json.dumps(result | harness.provenance(), indent=1))


if __name__ == "__main__":
    main()
