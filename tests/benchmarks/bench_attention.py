"""Backward pass of attention and of a linear layer: written out against automatic differentiation.

    python tests/benchmarks/bench_attention.py        prints one JSON object

The peer is the same forward left to `jax.grad`; shapes are those of the small policy's vision tower
(64 images of 96 patches, width 96, 4 heads). The floor is the time of the matmuls alone.
"""

import json
import platform
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from speciarl_jax.policy.attention import attend
from speciarl_jax.policy.layers import matmul

REPEATS = 15


def milliseconds(function, *arguments):
    """Median and spread (max - min) of REPEATS timed calls, compiled beforehand."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(times), 2), "min_ms": round(min(times), 2)}


def plain_attend(q, k, v, mask):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = jnp.einsum("bhqa,bhsa->bhqs", q, k) * np.float32(q.shape[-1] ** -0.5)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhqs,bhsa->bhqa", weights, v).transpose(0, 2, 1, 3)


def main():
    key = jax.random.key(0)
    q = jax.random.normal(key, (64, 96, 4, 24))
    mask = jnp.ones((64, 1, 96), bool)
    x = jax.random.normal(key, (64, 96, 96))
    w = 0.1 * jax.random.normal(key, (96, 288))
    folded, scores = q.reshape(256, 96, 24), jax.random.normal(key, (256, 96, 96))

    def attention_grad(attention):
        return jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, mask) ** 2), (0, 1, 2))

    def linear_grad(product):
        return jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), (0, 1))

    score_dot = milliseconds(lambda a: jnp.einsum("bqa,bsa->bqs", a, a), folded)
    value_dot = milliseconds(lambda s, a: jnp.einsum("bqs,bsa->bqa", s, a), scores, folded)
    linear_dot = milliseconds(lambda x, w: x.reshape(-1, 96) @ w, x, w)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    print(
        json.dumps(
            {
                "attention_ours": milliseconds(attention_grad(attend), q, q, q),
                "attention_autodiff": milliseconds(attention_grad(plain_attend), q, q, q),
                "attention_floor_min_ms": 3 * score_dot["min_ms"] + 4 * value_dot["min_ms"],
                "linear_ours": milliseconds(linear_grad(matmul), x, w),
                "linear_autodiff": milliseconds(linear_grad(lambda x, w: x @ w), x, w),
                "linear_floor_min_ms": 3 * linear_dot["min_ms"],
                "commit": commit.stdout.strip(),
                "jax": jax.__version__,
                "device": f"{jax.devices()[0].platform} {platform.processor() or ''}".strip(),
            }
        )
    )


if __name__ == "__main__":
    main()
