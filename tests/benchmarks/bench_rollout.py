"""The rollout engine against transformers' `generate`, its cost of N, and its slot utilisation.

    python tests/benchmarks/bench_rollout.py [--cases tiny middle group lengths] [--repeats N]

Prints one JSON object. The cases (all but `middle`, which takes five minutes, if none are named):

    tiny     1.4 M parameters, 8 images of 56 to 224 px, one sample each, 64 tokens
    middle   59 M parameters, 4 images, prompts of 300 tokens, 8 samples each, 96 tokens
    group    N = 8 against N = 1 on one image of `middle`, with its parts
    lengths  slots kept busy at log-normal lengths (median 120, 95 % below 600, at most 2048)

Both sides of `tiny` and `middle` run on one core in float32 from the same checkpoint, start from
the same pixels and prompt tokens, sample at temperature 1 and never stop early; the peer uses its
default attention (sdpa) and `num_return_sequences`. Memory is what each side's resident memory
peaks at above the loaded model, in a process of its own. The floor takes real tokens only (no
padding): FLOPs at the rate of a large product, or bytes that each decode step must read (weights,
keys and values) at the rate of reading as many, whichever takes longer.

`lengths` runs the engine's own loop and layout; only the sampled lengths are scripted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import harness
import jax
import numpy as np
from random_policy import (
    LIMITS,
    MIDDLE,
    TINY,
    Shape,
    encode_prompts,
    load_peer,
    peer_inputs,
    random_images,
    write_checkpoint,
)

from speciarl_jax.arch import Arch
from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.convert.loading import load_policy
from speciarl_jax.data.collate import collate
from speciarl_jax.policy import flops
from speciarl_jax.policy.layers import Dtypes
from speciarl_jax.policy.model import count_parameters, split_policy
from speciarl_jax.policy.vocabulary import Vocabulary
from speciarl_jax.rollout.encode import encode_by_size
from speciarl_jax.rollout.engine import RolloutEngine, RolloutStats, Wave
from speciarl_jax.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its prompts, and how much is sampled."""

    shape: Shape
    sizes_px: tuple[tuple[int, int], ...]
    text_tokens: int
    group_size: int
    completion_tokens: int
    repeats: int

    @property
    def sampled_tokens(self) -> int:
        """Of one call."""
        return len(self.sizes_px) * self.group_size * self.completion_tokens


TINY_SIZES = ((56, 56), (84, 84), (112, 84), (112, 112), (140, 140), (168, 140), (196, 196))
CASES = {
    "tiny": Case(TINY, (*TINY_SIZES, (224, 224)), 32, 1, 64, 9),
    "middle": Case(MIDDLE, ((448, 448),) * 4, 44, 8, 96, 3),
}
GROUP = Case(MIDDLE, ((448, 448),), 44, 8, 96, 3)


class OurSide:
    """The engine on a checkpoint and a batch of prompts."""

    def __init__(self, case: Case, path: pathlib.Path) -> None:
        """Loads and encodes; compiles nothing."""
        policy = load_policy(path, Dtypes())
        self.arch = arch = policy.arch
        self.parts = split_policy(policy)
        prompts = encode_prompts(random_images(case.sizes_px), arch, case.text_tokens)
        self.batch = collate(prompts, arch, LIMITS, pad_id=0)
        self.states = (self.parts.trainable, self.parts.frozen)
        self.vocabulary = Vocabulary(
            np.full(1, -1, np.int32), np.zeros(arch.text.vocab_size, bool), lambda tokens: ""
        )

    def encode(self) -> jax.Array:
        """The image table."""
        table = encode_by_size(
            self.parts.graphdef,
            self.states,
            self.batch.vision,
            self.arch.vision.window_patches,
        )
        return table.block_until_ready()

    def sampler(self, group_size: int, num_tokens: int) -> Callable[[jax.Array], None]:
        """Prefill and decode, of an image table."""
        config = RolloutConfig(
            group_size=group_size,
            max_completion_tokens=num_tokens,
            chunk_tokens=num_tokens,
            compact=False,
        )
        engine = RolloutEngine(self.parts.graphdef, config, self.vocabulary)
        expected = self.batch.num_prompts * group_size * num_tokens

        def sample(table: jax.Array) -> None:
            found = engine.generate(
                self.states,
                self.batch,
                table,
                group_size=group_size,
                sampling=Sampling(),
                seed=0,
                step=0,
            )
            count = sum(len(row.completion_tokens) for rows in found for row in rows)
            if count != expected:
                raise RuntimeError(f"engine sampled {count} tokens, expected {expected}")

        return sample


def peer_side(case: Case, path: pathlib.Path) -> Callable[[int], None]:
    """transformers' `generate` of so many tokens."""
    import torch
    from transformers import GenerationConfig

    model = load_peer(path)
    arch = Arch.from_dir(path)
    images = random_images(case.sizes_px)
    inputs = peer_inputs(images, encode_prompts(images, arch, case.text_tokens), arch)
    length = inputs["input_ids"].shape[1]
    model.generation_config = GenerationConfig()

    def generate(num_tokens: int) -> None:
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            num_return_sequences=case.group_size,
            pad_token_id=0,
        )
        with torch.inference_mode():
            out = model.generate(**inputs, generation_config=config)
        expected = (len(images) * case.group_size, length + num_tokens)
        if tuple(out.shape) != expected:
            raise RuntimeError(f"peer returned {tuple(out.shape)}, expected {expected}")

    return generate


def run_peer_case(name: str, repeats: int) -> dict[str, Any]:
    """Times both sides of `tiny` or `middle`."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        write_checkpoint(case.shape, path)
        ours, peer = OurSide(case, path), peer_side(case, path)
        memory = {side: peak_memory(name, side, path) for side in ("ours", "peer")}
    sample = ours.sampler(case.group_size, case.completion_tokens)
    start = ours.sampler(case.group_size, 1)
    table = ours.encode()
    start(table)
    sample(table)
    peer(2)
    runs = {"ours": lambda: sample(ours.encode()), "peer": lambda: peer(case.completion_tokens)}
    seconds = harness.interleaved(runs, repeats)
    parts = harness.interleaved({"encode": ours.encode, "first": lambda: start(table)}, repeats)
    tokens = {s: round(case.sampled_tokens / float(np.median(seconds[s]))) for s in seconds}
    found = floor(ours, case)
    return {
        "parameters": count_parameters(ours.parts.frozen),
        "sampled_tokens": case.sampled_tokens,
        **{side: harness.summary(times) for side, times in seconds.items()},
        "tokens_per_s": tokens,
        "speedup": harness.ratio(seconds["peer"], seconds["ours"]),
        "our_parts": our_parts(seconds["ours"], parts),
        "floor": found,
        "above_floor": {
            side: round(float(np.median(seconds[side])) / found["total_s"], 2) for side in seconds
        },
        "peak_memory_above_model_mb": memory,
    }


def our_parts(whole: list[float], parts: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of encode, prefill (with the first token) and the other decode steps."""
    encode, first = (float(np.median(parts[name])) for name in ("encode", "first"))
    rest = float(np.median(whole)) - encode - first
    return {"encode_s": round(encode, 4), "prefill_s": round(first, 4), "decode_s": round(rest, 4)}


def floor(ours: OurSide, case: Case) -> dict[str, float]:
    """Seconds that the real tokens need at the machine's own rates, and what they are made of."""
    batch, text = ours.batch, ours.arch.text
    lengths = np.full((batch.num_prompts, case.group_size), case.completion_tokens)
    windows = batch.vision.mask.reshape(len(batch.vision.mask), -1, ours.arch.vision.window_patches)
    counts = flops.count_tokens(batch.prompt_lengths, lengths, windows.sum(axis=-1))
    work = flops.sampling_flops(ours.arch, counts)
    gflop_per_s = max(harness.gemm_gflops().values())
    weights = flops.text_weights(text) + text.hidden_size * text.vocab_size
    mean_tokens = counts.prompt_tokens + lengths.size * case.completion_tokens / 2
    kv = 2 * text.num_layers * text.num_kv_heads * text.head_dim * mean_tokens
    step_bytes = int(4 * (weights + kv))
    gbytes_per_s = harness.read_gbytes_per_s(step_bytes)
    compute_s = {name: 1e-9 * value / gflop_per_s for name, value in work.items()}
    read_s = 1e-9 * step_bytes * case.completion_tokens / gbytes_per_s
    total = compute_s["encode"] + compute_s["prefill"] + max(compute_s["decode"], read_s)
    return {
        **{f"{name}_gflop": round(1e-9 * value, 2) for name, value in work.items()},
        "gemm_gflop_per_s": gflop_per_s,
        "decode_step_mb": round(step_bytes / 2**20, 1),
        "read_gb_per_s": gbytes_per_s,
        **{f"{name}_s": round(value, 4) for name, value in compute_s.items()},
        "decode_read_s": round(read_s, 4),
        "total_s": round(total, 4),
    }


def peak_memory(name: str, side: str, path: pathlib.Path) -> int:
    """MiB that one side needs above its loaded model, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", side, "--cases", name, "--model", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def measure_memory(name: str, side: str, path: pathlib.Path) -> int:
    """The child's part of `peak_memory`: a second call, so that nothing compiles."""
    harness.use_one_core(is_memory_run=True)
    case = CASES[name]
    if side == "peer":
        generate = peer_side(case, path)
        generate(2)
        return harness.peak_growth_mb(lambda: generate(case.completion_tokens))
    ours = OurSide(case, path)
    sample = ours.sampler(case.group_size, case.completion_tokens)
    sample(ours.encode())
    return harness.peak_growth_mb(lambda: sample(ours.encode()))


def run_group_case(repeats: int) -> dict[str, Any]:
    """Cost of N = 8 over N = 1: one image is encoded and prefilled once either way."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        write_checkpoint(GROUP.shape, path)
        ours = OurSide(GROUP, path)
    table = ours.encode()
    starts = {n: ours.sampler(n, 1) for n in (1, GROUP.group_size)}
    samplers = {n: ours.sampler(n, GROUP.completion_tokens) for n in starts}
    runs: dict[str, Callable[[], object]] = {"encode": ours.encode}
    for n in starts:
        runs[f"first_{n}"] = lambda n=n: starts[n](table)
        runs[f"whole_{n}"] = lambda n=n: samplers[n](ours.encode())
    for run in runs.values():
        run()
    seconds = harness.interleaved(runs, repeats)
    large = GROUP.group_size
    found: dict[str, Any] = {
        "prompt_tokens": int(ours.batch.prompt_lengths[0]),
        "completion_tokens": GROUP.completion_tokens,
    }
    for n in starts:
        parts = {"encode": seconds["encode"], "first": seconds[f"first_{n}"]}
        found[f"n_{n}"] = harness.summary(seconds[f"whole_{n}"]) | our_parts(
            seconds[f"whole_{n}"], parts
        )
    found["cost_of_n"] = harness.ratio(seconds[f"whole_{large}"], seconds["whole_1"])
    return found


class ScriptedEngine(RolloutEngine):
    """The engine with the decode program's tokens replaced by scripted stops."""

    def script(self, lengths: np.ndarray) -> None:
        """`lengths` [P, G]: at which token each answer stops."""
        self.scripted = lengths

    def advance(
        self,
        states: tuple[Any, ...],
        wave: Wave,
        row_map: object,
        until: int,
        enough: int,
        sampling: Sampling,
    ) -> None:
        """Ends the chunk when the decode program would: at `until`, or with `enough` rows left."""
        prompt = wave.rows.flat_prompt(wave.prompts.num_prompts)
        lengths = self.scripted[prompt, wave.rows.sample.reshape(-1)]
        is_live = ~wave.rows.is_free.reshape(-1)
        stops = np.sort(lengths[is_live])[::-1]
        end = min(until, int(stops[enough])) if len(stops) > enough else wave.step
        previous, wave.step = wave.step, end
        wave.state = dataclasses.replace(
            wave.state,
            lengths=np.minimum(lengths, end),
            is_done=~is_live | (lengths <= end),
        )
        self.stats.decode_steps += end - previous
        self.stats.slot_steps += wave.rows.is_free.size * (end - previous)


def run_lengths_case(num_prompts: int = 256, group_size: int = 10) -> dict[str, Any]:
    """Utilisation at the paper's batch, with compaction and without."""
    limit, median, p95 = 2048, 120, 600
    sigma = np.log(p95 / median) / 1.6449  # the normal distribution's 95 % point
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, (num_prompts, group_size))
    lengths = np.clip(np.ceil(drawn), 1, limit).astype(np.int32)
    shape = dataclasses.replace(TINY, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        write_checkpoint(shape, path)
        ours = OurSide(Case(shape, ((56, 56),) * num_prompts, 12, group_size, limit, 1), path)
    table = ours.encode()
    found: dict[str, Any] = {
        "answers": lengths.size,
        "mean_tokens": round(float(lengths.mean()), 1),
        "truncated_frac": round(float(np.mean(lengths == limit)), 4),
    }
    for name, compact in (("compacted", True), ("not_compacted", False)):
        config = RolloutConfig(
            group_size=group_size, max_completion_tokens=limit, chunk_tokens=64, compact=compact
        )
        engine = ScriptedEngine(ours.parts.graphdef, config, ours.vocabulary)
        engine.script(lengths)
        found[name] = utilisation(engine, ours, table, lengths)
    return found


def utilisation(
    engine: RolloutEngine, ours: OurSide, table: jax.Array, lengths: np.ndarray
) -> dict[str, Any]:
    """Runs the engine's loop and checks that every answer came out as scripted."""
    rows = engine.generate(
        ours.states,
        ours.batch,
        table,
        group_size=lengths.shape[1],
        sampling=Sampling(),
        seed=0,
        step=0,
    )
    got = np.zeros_like(lengths)
    for row in (row for finished in rows for row in finished):
        got[row.prompt, row.sample] += len(row.completion_tokens)
    if not np.array_equal(got, lengths):
        raise RuntimeError("answers of other lengths than scripted came out of the engine")
    stats: RolloutStats = engine.stats
    return {
        "slot_utilization": round(stats.slot_utilization, 3),
        "slot_steps": stats.slot_steps,
        "wasted_slot_steps": stats.slot_steps - stats.live_steps,
        "decode_steps": stats.decode_steps,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["tiny", "middle", "group", "lengths"]
    parser.add_argument("--cases", nargs="+", choices=names, default=["tiny", "group", "lengths"])
    parser.add_argument("--repeats", type=int, default=0, help="0: 9 for tiny, 3 for the others")
    parser.add_argument("--memory_of", choices=["ours", "peer"], help="only its peak memory, MiB")
    parser.add_argument("--model", help="with --memory_of: the checkpoint")
    args = parser.parse_args()
    if args.memory_of:
        print(measure_memory(args.cases[0], args.memory_of, pathlib.Path(args.model)))
        return
    harness.use_one_core()
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        **{n: lambda n=n: run_peer_case(n, args.repeats or CASES[n].repeats) for n in CASES},
        "group": lambda: run_group_case(args.repeats or GROUP.repeats),
        "lengths": run_lengths_case,
    }
    result = {"benchmark": "rollout", **{name: runs[name]() for name in args.cases}}
    print(json.dumps(result | harness.provenance(), indent=1))


if __name__ == "__main__":
    main()
