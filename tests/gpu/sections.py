"""The sections of `tests.gpu.check`: each prints figures as JSON lines, the earlier the better.

The programs are those that `speciarl plan` compiles, with its shapes, and arrays in place of them.
"""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speciarl_jax.config.recipes import load_recipe
from speciarl_jax.config.schema import MeshConfig
from speciarl_jax.devices.mesh import make_mesh
from speciarl_jax.monitor import writer
from speciarl_jax.plan import hlo
from speciarl_jax.plan.chips import CHIPS, Chip, Topology
from speciarl_jax.plan.make import Planned, open_plan
from speciarl_jax.plan.measure import measure
from speciarl_jax.plan.programs import Program, step_programs
from speciarl_jax.plan.traffic import decode_traffic
from speciarl_jax.policy import flash, flops
from speciarl_jax.rollout.sampling import Sampling, sample_tokens

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "qwen2_5_vl_3b_gpu_smoke.py:memory={}")
TINY = [
    *("model.path=tiny", "rollout.max_completion_tokens=16", "rollout.chunk_tokens=4"),
    *("rollout.group_size=2", "train.prompts_per_step=8", "train.prompts_per_update=8"),
    *("data.max_prompt_tokens=32", "data.prompt_buckets=(32,)"),
]
SMOKE = [
    *("model.compute_dtype=bfloat16", "model.param_dtype=bfloat16", "data.num_train=16"),
    *("train.prompts_per_step=4", "train.prompts_per_update=4", "train.prompts_per_micro_batch=4"),
    *("rollout.group_size=4", "eval.score_base=false", "eval.score_trained=false"),
    *("train.eval_every=0", "train.save_every=2", "mesh.data=1"),  # one device of many
]


def say(**figures: float | str) -> None:
    """Figures so far survive a later crash."""
    print(json.dumps(figures), flush=True)


def here() -> Chip:
    """The card of this machine; without one that the plan knows, an L4's figures stand in."""
    kind = jax.devices()[0].device_kind
    return next((one for one in CHIPS.values() if kind.startswith(one.kind)), CHIPS["l4"])


def seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median after one call that compiles."""
    jax.block_until_ready(function())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def peak_gib() -> float:
    """Most that this process has had on the device; 0 where jax does not count it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30


# ---- the card itself -----------------------------------------------------------------------------


def device(out: pathlib.Path, is_tiny: bool) -> None:
    """Name, memory, and what a product and a copy reach."""
    card, chip, stats = jax.devices()[0], here(), jax.devices()[0].memory_stats() or {}
    say(
        platform=card.platform,
        kind=card.device_kind,
        planned_as=chip.kind,
        jax=jax.__version__,
        limit_gib=stats.get("bytes_limit", 0) / 2**30,
        planned_limit_gib=chip.usable_bytes / 2**30,
    )
    size = 256 if is_tiny else 8192
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    tflops = 2 * size**3 / seconds_of(lambda: product(a)) / 1e12
    say(matmul_tflops=tflops, matmul_of_peak=tflops * 1e12 / chip.peak)
    x = jnp.ones(2**20 if is_tiny else 2**30, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    gb_s = 2 * x.nbytes / seconds_of(lambda: copy(x)) / 1e9
    say(copy_gb_s=gb_s, copy_of_bandwidth=gb_s / chip.hbm_gb_s)


# ---- kernels -------------------------------------------------------------------------------------


def attention_kernels(out: pathlib.Path, is_tiny: bool) -> None:
    """Kernels and the plain form, both in bfloat16, against the plain form in float32."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    say(kernel=flash.kernel_platform(mesh, jnp.bfloat16) or "plain")
    prompts, group, length, width = (2, 2, 32, 16) if is_tiny else (4, 8, 256, 256)
    lengths = jnp.arange(length, length - prompts, -1, dtype=jnp.int32)
    sees = jnp.arange(length)[None] < lengths[:, None]
    patches = 128 if is_tiny else 4096
    mask = jax.random.bernoulli(jax.random.key(6), 0.8, (2, patches)).at[:, 0].set(True)

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)

    def causal(q: Any, k: Any, v: Any, *, mesh: Any) -> jax.Array:
        return jnp.where(sees[..., None, None], flash.attend_causal(q, k, v, lengths, mesh), 0)

    def shared(q: Any, k: Any, v: Any, pk: Any, pv: Any, *, mesh: Any) -> jax.Array:
        return flash.attend_group(q, k, v, pk, pv, sees, mesh)

    def image(q: Any, k: Any, v: Any, *, mesh: Any) -> jax.Array:
        return jnp.where(mask[..., None, None], flash.attend_image(q, k, v, mask, mesh), 0)

    prompt = [draw(seed, prompts, length, 2, 128) for seed in (1, 2)]
    own = [draw(seed, prompts, group, width, 2, 128) for seed in (4, 5)]
    cases = {
        "causal": (causal, [draw(0, prompts, length, 16, 128), *prompt]),
        "group": (shared, [draw(3, prompts, group, width, 16, 128), *own, *prompt]),
        "image": (image, [draw(seed, 2, patches, 16, 80) for seed in (7, 8, 9)]),
    }
    for name, (function, inputs) in cases.items():
        say(**{f"{name}_{key}": value for key, value in parity(function, inputs, mesh).items()})


def parity(function: Callable[..., Any], inputs: list[jax.Array], mesh: Any) -> dict[str, float]:
    """Errors of a kernel, alone and over those of the plain form; milliseconds of both."""
    direction = jax.random.normal(jax.random.key(11), inputs[0].shape)

    def both(mesh: Any) -> Callable[..., Any]:
        def loss(*x: Any) -> Any:
            value = function(*x, mesh=mesh)
            return jnp.sum(value.astype(jnp.float32) * direction), value

        return jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))

    with jax.default_matmul_precision("highest"):
        exact = both(None)(*(x.astype(jnp.float32) for x in inputs))
    kernel, plain = both(mesh), both(None)

    def errors(found: Any) -> tuple[float, float]:
        (_, value), grads = found
        (_, exact_value), exact_grads = exact
        worst = max(distance(a, b) for a, b in zip(grads, exact_grads, strict=True))
        return distance(value, exact_value), worst

    (forward, grads), (plain_forward, plain_grads) = errors(kernel(*inputs)), errors(plain(*inputs))
    return {
        "forward_error": forward,
        "forward_vs_plain": forward / plain_forward,
        "grads_error": grads,
        "grads_vs_plain": grads / plain_grads,
        "ms": 1e3 * seconds_of(lambda: kernel(*inputs)),
        "plain_ms": 1e3 * seconds_of(lambda: plain(*inputs)),
    }


def distance(found: Any, exact: Any) -> float:
    """Relative, in the 2-norm; infinite for what is no number."""
    a, b = (np.asarray(x, np.float32) for x in (found, exact))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if np.isfinite(error) else float("inf")


# ---- sampler -------------------------------------------------------------------------------------


def sampler(out: pathlib.Path, is_tiny: bool) -> None:
    """Frequencies against the softmax, the cut of top-p against numpy, and log-probabilities."""
    vocabulary, draws = 512, 20_000 if is_tiny else 200_000
    logits = 2 * np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32)
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, vocabulary))
    uniforms = jax.random.uniform(jax.random.key(0), (draws,))
    sample = jax.jit(sample_tokens, static_argnums=2)
    tokens, logprobs = map(np.asarray, sample(rows, uniforms, Sampling()))
    counted = np.bincount(tokens, minlength=vocabulary) / draws
    # The mean absolute deviation of a frequency is sqrt(2 p (1 - p) / (pi n)).
    expected = np.sqrt(2 * probs * (1 - probs) / (np.pi * draws)).sum()
    say(
        distance_over_expected=float(np.abs(counted - probs).sum() / expected),
        logprob_error=float(np.abs(logprobs - np.log(probs[tokens])).max()),
    )
    cut, _ = sample(rows, uniforms, Sampling(top_p=0.5))
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.5)) + 1]
    say(outside_top_p=float(np.mean(~np.isin(np.asarray(cut), kept))))


# ---- programs of the plan, with arrays -----------------------------------------------------------


def open_here(is_tiny: bool) -> Planned:
    """The smoke recipe laid out on the first device of this machine."""
    chip = here()
    recipe = RECIPE.format(80 if chip.memory_gib > 60 else 24)
    config, _ = load_recipe(recipe, [f"--config.{change}" for change in TINY] if is_tiny else [])
    config.validate()
    devices = tuple(jax.devices()[:1])
    return open_plan(config, Topology("gpu:herex1", chip, devices, devices))


def find(planned: Planned, name: str) -> Program:
    programs = step_programs(planned.session, planned.shapes)
    return next(one for one in programs if one.name == name)


def arrays(tree: Any, values: dict[str, Any]) -> Any:
    """Arrays for ShapeDtypeStructs: `values` by the end of a path, else small random numbers."""

    def fill(path: Any, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        name = jax.tree_util.keystr(path)
        given = next((value for end, value in values.items() if end in name), None)
        if given is None and "norm" in name:
            given = 1
        if given is not None:
            filled = np.broadcast_to(np.asarray(given), x.shape).astype(x.dtype)
            return jax.device_put(filled, x.sharding)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        return jax.device_put(noise(zlib.crc32(name.encode()) >> 1, x.shape, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(fill, tree)


@functools.partial(jax.jit, static_argnums=(1, 2))
def noise(seed: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, of the size of a model's weights; drawn on the device."""
    return (0.02 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def is_traced(argument: Any) -> bool:
    """Whether an argument of a program is made of arrays; others are static."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(argument))


def say_memory(planned_gib: float) -> None:
    peak = peak_gib()
    say(peak_gib=peak, planned_gib=planned_gib, peak_over_plan=peak / planned_gib)


def decode(out: pathlib.Path, is_tiny: bool) -> None:
    """Tokens a second with every row live, and bytes a second of what must move."""
    planned, chip = open_here(is_tiny), here()
    program, shapes = find(planned, "decode"), planned.shapes
    prompts, group = shapes.wave_prompts, shapes.group_size
    rows, columns = prompts * group, shapes.completion_tokens
    index = np.arange(rows)
    start = time.perf_counter()
    compiled = program.lower().compile()
    say(compile_s=time.perf_counter() - start, rows=rows, columns=columns)
    values = {
        "row_prompt": index // group,
        "row_slot": index,
        "slot_rows": index.reshape(prompts, group),
        "[2].lengths": shapes.prompt_tokens,
        "[6]": -1,  # stop ids that no token has
    }
    traced = [i for i, arg in enumerate(program.args) if is_traced(arg)]
    args = arrays(program.args, values)
    fresh = program.args[4]

    def run(steps: int) -> float:
        state = jax.block_until_ready(arrays(fresh, {}))
        called = {**{i: args[i] for i in traced}, 4: state, 8: np.int32(steps)}
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(*(called[i] for i in traced)))
        seconds = time.perf_counter() - start
        assert int(state.step) == steps, f"{int(state.step)} steps, expected {steps}"
        assert bool(jnp.isfinite(state.logprobs).all()), "log-probabilities that are no numbers"
        return seconds

    run(1)
    few = max(columns // 4, 1)
    short, whole = run(few), min(run(columns), run(columns))
    step_s = (whole - short) / (columns - few)
    say(tokens_per_s=rows * columns / whole, step_ms=1e3 * step_s)
    if jax.devices()[0].platform == "gpu":
        size = planned.session.arch.text.vocab_size
        traffic = decode_traffic(hlo.parse(compiled.as_text() or ""), (size, size))
        needed, moved = sum(traffic.needed.values()), sum(traffic.moved.values())
        say(launches=traffic.launches, needed_gb=needed / 1e9, moved_gb=moved / 1e9)
        say(
            needed_gb_s=needed / step_s / 1e9,
            moved_gb_s=moved / step_s / 1e9,
            needed_of_bandwidth=needed / step_s / 1e9 / chip.hbm_gb_s,
        )
    say_memory(measure(program).peak / 2**30)


def update(out: pathlib.Path, is_tiny: bool) -> None:
    """Seconds, MFU and memory of the update with every answer at its limit."""
    planned, chip = open_here(is_tiny), here()
    program, shapes, arch = find(planned, "update"), planned.shapes, planned.session.arch
    values = {"prompt_lengths": shapes.prompt_tokens, "image_rows": -1}
    graphdef, trainable, frozen, optim, batch, *rest = arrays(program.args, values)
    optim = jax.tree.map(jnp.zeros_like, optim)  # second moments are not negative
    walls = []
    for _ in range(4):
        start = time.perf_counter()
        trainable, optim, stats = program.function(graphdef, trainable, frozen, optim, batch, *rest)
        norm = float(stats["grad_norm"])
        walls.append(time.perf_counter() - start)
        assert np.isfinite(norm), "a gradient that is no number"
    full = np.full((shapes.num_prompts, shapes.group_size), shapes.completion_tokens)
    windows = np.full((shapes.num_prompts, shapes.windows), arch.vision.window_patches)
    counts = flops.count_tokens(np.full(len(full), shapes.prompt_tokens), full, windows)
    training = flops.Training.of(planned.config, planned.layout.adapter_params)
    learned, best = flops.learning_flops(arch, counts, training), min(walls[1:])
    model = learned["forward"] + learned["backward"]
    hardware = flops.update_hardware_flops(arch, counts, training)
    say(
        first_s=walls[0],
        seconds=best,
        mfu=model / best / chip.peak,
        hardware_utilisation=hardware / best / chip.peak,
        tokens_per_s=(counts.prompt_tokens + counts.completion_tokens) / best,
    )
    say_memory(measure(program).peak / 2**30)


# ---- whole runs ----------------------------------------------------------------------------------


def train(workdir: pathlib.Path, steps: int, *words: str) -> None:
    changes = [f"--config.{one}" for one in (*SMOKE, f"data.data_dir={workdir.parent / 'data'}")]
    command = [sys.executable, "-m", "speciarl_jax.cli", "train", f"--workdir={workdir}"]
    recipe = f"--config={ROOT / 'configs' / 'cpu_smoke.py'}:updates=1"
    steps_flag = f"--config.train.num_steps={steps}"
    done = subprocess.run(
        [*command, recipe, steps_flag, *changes, *words], check=False, stdout=sys.stderr, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.returncode)  # what it said is the last line of the log


def rows_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [writer.deterministic(row) for row in writer.read_rows(workdir / "metrics.jsonl")]


def smoke(out: pathlib.Path, is_tiny: bool) -> None:
    """Two steps of the small policy in bfloat16, through the command line."""
    start = time.perf_counter()
    train(out / "smoke", 2, "--overwrite")
    rows = [row for row in rows_of(out / "smoke") if "mismatch/logprob_mean_abs" in row]
    say(steps=len(rows), seconds=time.perf_counter() - start)
    say(mismatch_mean=max(float(row["mismatch/logprob_mean_abs"]) for row in rows))


def resume(out: pathlib.Path, is_tiny: bool) -> None:
    """Four steps at once, and two and then two: what a GPU repeats, and how far it is off."""
    train(out / "whole", 4, "--overwrite")
    train(out / "halves", 4, "--overwrite", "--config.train.num_steps=2")
    train(out / "halves", 4, "--resume")
    whole, halves = rows_of(out / "whole"), rows_of(out / "halves")
    say(steps=len([row for row in halves if "reward/mean" in row]))
    say(largest_difference=largest_difference(whole, halves), is_bit_equal=float(whole == halves))


def largest_difference(whole: list[dict[str, Any]], halves: list[dict[str, Any]]) -> float:
    """Of log-prob mismatch and KL, which no single sampled token turns over."""
    differences = [0.0 if len(whole) == len(halves) else float("inf")]
    names = ("mismatch/logprob_mean_abs", "policy/kl")
    for a, b in zip(whole, halves, strict=False):
        differences += [abs(float(a[name]) - float(b[name])) for name in names if name in a]
    return max(differences)


SECTIONS: dict[str, Callable[[pathlib.Path, bool], None]] = {
    "device": device,
    "attention": attention_kernels,
    "sampler": sampler,
    "decode": decode,
    "update": update,
    "smoke": smoke,
    "resume": resume,
}

if __name__ == "__main__":
    SECTIONS[sys.argv[1]](pathlib.Path(sys.argv[2]).resolve(), "--tiny" in sys.argv)
