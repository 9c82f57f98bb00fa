"""Loading never holds a second copy: anonymous memory beyond the parameters stays below a shard."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from speciarl_jax.arch import Arch
from speciarl_jax.convert.names import checkpoint_entries

# Qwen2.5-VL-3B-Instruct's config.json, both towers cut to 4 layers.
CONFIG = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 4,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [3],
        "window_size": 112,
        "patch_size": 14,
        "hidden_act": "silu",
    },
}

# Peak of anonymous resident memory (mapped files do not count), sampled every 2 ms.
CHILD = """
import json, sys, threading, time
import jax, jax.numpy as jnp
from flax import nnx
from speciarl_jax.convert.loading import load_policy
from speciarl_jax.policy.layers import Dtypes

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

jnp.zeros(8).block_until_ready()
peak, done = [before := anonymous()], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
policy = load_policy(sys.argv[1], Dtypes(param=jnp.dtype(sys.argv[2])))
jax.block_until_ready(nnx.state(policy))
seconds = time.perf_counter() - start
done.set()
thread.join()
params = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(policy)))
print(json.dumps({"peak": peak[0] - before, "params": params, "seconds": seconds}))
"""


def _write_checkpoint(path: pathlib.Path, num_shards: int = 4) -> int:
    """Fills shards up to an even share each; returns the size of the largest file."""
    (path / "config.json").write_text(json.dumps(CONFIG))
    entries = checkpoint_entries(Arch.from_hf(CONFIG))
    share = sum(int(np.prod(entry.hf_shape)) for entry in entries) / num_shards
    shards, filled = [[] for _ in range(num_shards)], [0] * num_shards
    for entry in sorted(entries, key=lambda entry: -np.prod(entry.hf_shape)):
        place = int(np.argmin(filled))
        shards[place].append(entry)
        filled[place] += int(np.prod(entry.hf_shape))
    assert min(filled) > 0.3 * share
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(
            {entry.key: np.full(entry.hf_shape, 0.5, ml_dtypes.bfloat16) for entry in shard},
            path / name,
        )
        weight_map |= dict.fromkeys((entry.key for entry in shard), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_beyond_the_parameters_is_below_the_largest_shard_plus_a_fifth(tmp_path, dtype):
    largest = _write_checkpoint(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), dtype],
        check=True,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    found = json.loads(child.stdout)
    extra = found["peak"] - found["params"]
    print(
        f"{dtype}: extra {extra / 1e6:.0f} MB, params {found['params'] / 1e6:.0f} MB, largest "
        f"shard {largest / 1e6:.0f} MB, {found['seconds']:.1f} s"
    )
    assert extra <= 1.2 * largest
