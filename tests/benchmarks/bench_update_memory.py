"""Memory and work of the update at the 7B shape: shared-prefix tree against N full sequences.

    python tests/benchmarks/bench_update_memory.py [--layers 28] [--groups 1] [--repeats 5]
    python tests/benchmarks/bench_update_memory.py --tpu=v5p:2x2x1     memory only, for that chip

Prints one JSON object. One group of N = 10 completions of 128 tokens on a prompt of 300 is one
micro-batch; LoRA of rank 64, rematerialisation as in configs/qwen2_5_vl_7b_cub.py (`full`: each
layer keeps its input). Both sides are forward and backward of the same loss by this package's own
layers:

    tree    `update.batch_loss`
    naive   N sequences [prompt, completion] through the plain causal forward, the head on
            completion tokens only

Vision is left out (image embeddings are given). Nothing of 7B's size is allocated: the programs are
compiled from shapes for the CPU, and XLA's buffer assignment is read.

    temp            what the program allocates besides arguments and results
    temp_of_tokens  temp less that of a group of hardly any tokens: activations, logits, scores; not
                    the copies of single layers' weights that the CPU compiler cuts from the stack
    arguments       base, adapter and batch, the same on both sides
    results         the adapter's gradients, the same on both sides

Everything is compiled in float32: for bfloat16 XLA's CPU compiler keeps float32 copies of all
weights (27 GB here), which no accelerator does. Times are of a small shape, on one core.

With ``--tpu`` the same two programs are compiled in bfloat16 for one chip of that topology by
libtpu (`pip install -e ".[plan]"`), the same plain attention on both sides; no chip is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jaxtyping import Array

from speciarl_jax.arch import Arch, TextArch, VisionArch
from speciarl_jax.config.schema import LoraConfig
from speciarl_jax.learner.logprobs import LossConfig, TrainBatch, TreeBatch, token_logprobs
from speciarl_jax.learner.update import batch_loss
from speciarl_jax.policy import flops
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.lora import add_lora
from speciarl_jax.policy.model import Policy, PolicyParts, split_policy

SETTINGS = LossConfig(remat="full")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one group: prompt tokens (of which image tokens), answers, tokens of an answer."""

    prompt: int
    image: int
    group: int
    completion: int


FULL = Sizes(prompt=300, image=256, group=10, completion=128)
HARDLY_ANY = Sizes(prompt=12, image=1, group=1, completion=2)


def large_arch(num_layers: int) -> Arch:
    """Qwen2.5-VL-7B's language model with so many layers, and the smallest tower."""
    text = TextArch(152_064, 3584, 18_944, num_layers, 28, 4, (16, 24, 24))
    return Arch(vision=VisionArch(1, 16, 16, 2, text.hidden_size, ()), text=text)


def small_arch() -> Arch:
    """A shape whose update takes seconds on one core."""
    text = TextArch(4096, 256, 1024, 4, 4, 2, (8, 12, 12))
    return Arch(vision=VisionArch(1, 16, 16, 2, text.hidden_size, ()), text=text)


def make_policy(arch: Arch, rank: int, dtype: jnp.dtype = jnp.float32) -> Policy:
    """A random policy with an adapter."""
    policy = Policy(arch, dtypes=Dtypes(jnp.dtype(dtype), jnp.dtype(dtype)), rngs=nnx.Rngs(0))
    add_lora(policy, LoraConfig(rank=rank, alpha=rank / 2), seed=0)
    return policy


def make_batch(arch: Arch, sizes: Sizes, groups: int = 1) -> TrainBatch:
    """Groups of text, an image's tokens, text; full-length completions."""
    rng = np.random.default_rng(0)
    rows = np.full((groups, sizes.prompt), -1, np.int32)
    rows[:, 10 : 10 + sizes.image] = np.arange(sizes.image)
    group = (groups, sizes.group, sizes.completion)
    tree = TreeBatch(
        prompt_tokens=rng.integers(0, 4096, (groups, sizes.prompt), dtype=np.int32),
        prompt_lengths=np.full(groups, sizes.prompt, np.int32),
        positions=np.tile(np.arange(sizes.prompt, dtype=np.int32), (groups, 3, 1)),
        next_position=np.full(groups, sizes.prompt, np.int32),
        image_rows=rows,
        images=rng.normal(size=(groups, sizes.image, arch.text.hidden_size)).astype(np.float32),
        completion_tokens=rng.integers(0, 4096, group, dtype=np.int32),
    )
    return TrainBatch(
        tree=tree,
        weights=np.full(group, 1 / (groups * sizes.group * sizes.completion), np.float32),
        advantages=rng.normal(size=(groups, sizes.group)).astype(np.float32),
    )


Loss = Callable[[Policy, TrainBatch, Array], Array]


def tree_loss(policy: Policy, batch: TrainBatch, banned: Array) -> Array:
    """The package's own."""
    return batch_loss(policy, batch, banned, SETTINGS)[0]


def naive_loss(policy: Policy, batch: TrainBatch, banned: Array) -> Array:
    """The same number from N full sequences."""
    tree = batch.tree
    groups, group, width = tree.completion_tokens.shape
    prompt, images = tree.prompt_tokens.shape[1], tree.images.shape[1]
    own = tree.next_position[:, None] + jnp.arange(width)[None]
    ids = jnp.concatenate([tree.positions, jnp.tile(own[:, None], (1, 3, 1))], axis=2)
    tokens = jnp.concatenate(
        [jnp.repeat(tree.prompt_tokens, group, axis=0), tree.completion_tokens.reshape(-1, width)],
        axis=1,
    )
    offset = jnp.arange(groups, dtype=jnp.int32)[:, None] * images
    rows = jnp.where(tree.image_rows >= 0, tree.image_rows + offset, -1)
    rows = jnp.pad(rows, ((0, 0), (0, width)), constant_values=-1)
    hidden = policy.hidden_states(
        tokens,
        jnp.repeat(ids, group, axis=0),
        jnp.full(groups * group, prompt + width),
        jnp.repeat(rows, group, axis=0),
        tree.images.reshape(groups * images, -1),
        SETTINGS.remat,
    )
    predicting = hidden[:, prompt - 1 : -1].reshape(groups, group, width, -1)
    logprobs, _ = token_logprobs(policy.text, predicting, tree.completion_tokens, banned, SETTINGS)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    return -jnp.sum(batch.weights * batch.advantages[..., None] * ratio)


SIDES: dict[str, Loss] = {"tree": tree_loss, "naive": naive_loss}


def gradient(parts: PolicyParts, loss: Loss) -> Callable[..., Any]:
    """Jitted loss and gradient by the adapter, of (trainable, frozen, batch, banned)."""

    def value(trainable: nnx.State, frozen: nnx.State, batch: TrainBatch, banned: Array) -> Array:
        return loss(nnx.merge(parts.graphdef, trainable, frozen), batch, banned)

    return jax.jit(jax.value_and_grad(value))


def memory_mb(
    arch: Arch, sizes: Sizes, loss: Loss, groups: int = 1, chip: jax.Device | None = None
) -> dict[str, int]:
    """MiB of one program, compiled from shapes; for this machine's CPU or a chip elsewhere."""
    dtype = jnp.bfloat16 if chip else jnp.float32
    policy = nnx.eval_shape(lambda: make_policy(arch, 64, dtype))
    parts = split_policy(policy)
    place = jax.sharding.SingleDeviceSharding(chip) if chip else None

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    banned = np.zeros(arch.text.vocab_size, bool)
    args = (parts.trainable, parts.frozen, make_batch(arch, sizes, groups), banned)
    lowered = gradient(parts, loss).lower(*jax.tree.map(shape, args))
    stats = lowered.compile().memory_analysis()
    return {
        "temp_mb": round(stats.temp_size_in_bytes / 2**20),
        "arguments_mb": round(stats.argument_size_in_bytes / 2**20),
        "results_mb": round(stats.output_size_in_bytes / 2**20),
    }


def tpu_memory(num_layers: int, groups: int, topology: str) -> dict[str, Any]:
    """Each side's program for a TPU, and the tree's share of the naive one's."""
    chip = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    arch = large_arch(num_layers)
    found = {name: memory_mb(arch, FULL, loss, groups, chip) for name, loss in SIDES.items()}
    share = found["tree"]["temp_mb"] / found["naive"]["temp_mb"]
    return {**found, "tree_share_of_naive": {"temp": round(share, 3)}}


def compiled_memory(num_layers: int, groups: int) -> dict[str, Any]:
    """Each side's program at 7B's width, and the tree's share of the naive one's."""
    arch = large_arch(num_layers)
    found = {}
    for name, loss in SIDES.items():
        full = memory_mb(arch, FULL, loss, groups)
        least = memory_mb(arch, HARDLY_ANY, loss)
        found[name] = full | {"temp_of_tokens_mb": full["temp_mb"] - least["temp_mb"]}
    tree, naive = found["tree"], found["naive"]
    kept = ("temp_mb", "arguments_mb", "results_mb")
    share = {
        "temp": tree["temp_mb"] / naive["temp_mb"],
        "temp_of_tokens": tree["temp_of_tokens_mb"] / naive["temp_of_tokens_mb"],
        "temp_arguments_results": sum(tree[k] for k in kept) / sum(naive[k] for k in kept),
    }
    return {**found, "tree_share_of_naive": {k: round(v, 3) for k, v in share.items()}}


def flops_share(num_layers: int) -> dict[str, float]:
    """Analytic TFLOP of forward, backward and recomputation, and the tree's share."""
    arch = large_arch(num_layers)
    text = arch.text
    kv_width = text.num_kv_heads * text.head_dim
    sides = 6 * text.hidden_size + 2 * kv_width + 3 * (text.hidden_size + text.intermediate_size)
    training = flops.Training(adapter_params=64 * num_layers * sides, remat="full")
    no_images = np.zeros((0, 1), int)
    lengths = np.full((1, FULL.group), FULL.completion)
    tree = flops.count_tokens(np.full(1, FULL.prompt), lengths, no_images)
    naive = flops.count_tokens(np.full(FULL.group, FULL.prompt), lengths.T, no_images)
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
    parts = split_policy(make_policy(arch, rank=16))
    batch = jax.device_put(make_batch(arch, FULL))
    banned = jnp.zeros(arch.text.vocab_size, bool)
    runs = {}
    for name, loss in SIDES.items():
        program = gradient(parts, loss)
        runs[name] = lambda f=program: jax.block_until_ready(
            f(parts.trainable, parts.frozen, batch, banned)
        )
    losses = {name: float(run()[0]) for name, run in runs.items()}
    if not np.isclose(losses["tree"], losses["naive"], rtol=1e-4):
        raise RuntimeError(f"losses differ: {losses}; expected within 1e-4")
    seconds = harness.interleaved(runs, repeats)
    return {
        **{name: harness.summary(times) for name, times in seconds.items()},
        "speedup": harness.ratio(seconds["naive"], seconds["tree"]),
    }


def main() -> None:
    """Compiles, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--groups", type=int, default=1, help="of a micro-batch; memory only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tpu", default="", help="topology such as v5p:2x2x1")
    args = parser.parse_args()
    if args.tpu:
        memory = tpu_memory(args.layers, args.groups, args.tpu)
        about = {"benchmark": "update_memory"} | vars(args)
        print(json.dumps(about | {"memory": memory} | harness.provenance(), indent=1))
        return
    harness.use_one_core()
    result = {
        "benchmark": "update_memory",
        "shape": f"7B width, {args.layers} layers",
        "group": dataclasses.asdict(FULL),
        "remat": SETTINGS.remat,
        "logprob_chunk_tokens": SETTINGS.logprob_chunk_tokens,
        "groups": args.groups,
        "memory": compiled_memory(args.layers, args.groups),
        "flops": flops_share(args.layers),
        "time_small_shape": measured_time(args.repeats),
    }
    print(json.dumps(result | harness.provenance(), indent=1))


if __name__ == "__main__":
    main()
