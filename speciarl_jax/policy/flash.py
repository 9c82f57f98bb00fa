"""Attention without the score matrix in memory: one function, three platforms.

`attend_blockwise` runs Pallas splash attention on TPU and cuDNN on GPU, both with their own
gradients; on CPU it is the plain form of `speciarl_jax.policy.attention`. The platform is that of
the mesh, not of the process: `speciarl plan` compiles for TPU on a machine without one. Kernels are
opaque to XLA's partitioner, so each device runs its own on its prompts and heads (shard_map).

A shared prompt is no special case here: queries of a completion look at concat(prompt, own), causal
with the prompt's length as offset, padding of the prompt hidden.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from speciarl_jax.devices.layout import PROMPT_AXES
from speciarl_jax.devices.mesh import AXES
from speciarl_jax.policy.attention import attend, attend_shared, causal_mask

_LANES = 128  # splash wants sequence lengths and head width in multiples of this
_BLOCKS = (512, 384, 256, 128)


def kernel_platform(mesh: Mesh | None, dtype: jnp.dtype) -> str:
    """``tpu`` or ``gpu`` where a kernel runs, ``""`` for the plain form.

    cuDNN takes 16-bit floats only, so a float32 run on GPU uses the plain form.
    """
    platform = mesh.devices.flat[0].platform if mesh is not None else "cpu"
    if platform == "tpu":
        return "tpu"
    is_half = dtype in (jnp.bfloat16, jnp.float16)
    return "gpu" if platform in ("gpu", "cuda") and is_half else ""


def attend_causal(
    q: Float[Array, "B T H A"],
    k: Float[Array, "B T K A"],
    v: Float[Array, "B T K A"],
    lengths: Int[Array, " B"],
    mesh: Mesh | None = None,
) -> Float[Array, "B T H A"]:
    """Each token sees itself and those before it; left-aligned sequences of `lengths` tokens."""
    if mesh is None or not kernel_platform(mesh, q.dtype):
        return attend(q, k, v, causal_mask(lengths, q.shape[1]))
    sees = jnp.arange(k.shape[1])[None] < lengths[:, None]
    return attend_blockwise(q, k, v, sees, 0, mesh)


def attend_group(
    q: Float[Array, "P G C H A"],
    k: Float[Array, "P G C K A"],
    v: Float[Array, "P G C K A"],
    prompt_k: Float[Array, "P S K A"],
    prompt_v: Float[Array, "P S K A"],
    sees_prompt: Bool[Array, "P S"],
    mesh: Mesh | None = None,
) -> Float[Array, "P G C H A"]:
    """Completions over [prompt, own tokens so far]; arguments as `attention.attend_shared`."""
    if mesh is None or not kernel_platform(mesh, q.dtype):
        return attend_shared(q, k, v, prompt_k, prompt_v, sees_prompt)
    prompts, group, width = q.shape[:3]

    def join(prompt: Array, own: Array) -> Array:  # -> [P*G, S + C, K, A]
        repeated = jnp.broadcast_to(prompt[:, None], (prompts, group, *prompt.shape[1:]))
        joined = jnp.concatenate([repeated, own], axis=2)
        return joined.reshape(-1, *joined.shape[2:])

    own_sees = jnp.ones((prompts, group, width), bool)
    sees = join(sees_prompt, own_sees)
    flat_q = q.reshape(-1, *q.shape[2:])
    offset = prompt_k.shape[1]
    out = attend_blockwise(flat_q, join(prompt_k, k), join(prompt_v, v), sees, offset, mesh)
    return out.reshape(q.shape)


def attend_image(
    q: Float[Array, "I N H A"],
    k: Float[Array, "I N H A"],
    v: Float[Array, "I N H A"],
    mask: Bool[Array, "I N"],
    mesh: Mesh | None = None,
) -> Float[Array, "I N H A"]:
    """Every patch sees every real patch of its own image."""
    if mesh is None or not kernel_platform(mesh, q.dtype):
        return attend(q, k, v, mask[:, None])
    row_axes = AXES if q.shape[0] % mesh.size == 0 else PROMPT_AXES
    return attend_blockwise(q, k, v, mask, None, mesh, row_axes)


def attend_blockwise(
    q: Float[Array, "B Tq H A"],
    k: Float[Array, "B Tk K A"],
    v: Float[Array, "B Tk K A"],
    sees: Bool[Array, "B Tk"],
    offset: int | None,
    mesh: Mesh,
    row_axes: tuple[str, ...] = PROMPT_AXES,
) -> Float[Array, "B Tq H A"]:
    """Query i looks at key j where sees[j] and, with an offset, j <= i + offset.

    Args:
        q, k, v: unscaled queries; grouped key-value heads.
        sees: False for padding keys. A query that sees nothing returns finite rubbish, which its
            caller discards.
        offset: tokens before query 0; None for attention in both directions.
        mesh: its platform chooses the kernel.
        row_axes: what the rows are spread over, if they divide; heads are spread over tensor,
            unless the rows are.
    """
    platform = kernel_platform(mesh, q.dtype)
    kernels = {"tpu": attend_splash, "gpu": attend_cudnn}
    run = functools.partial(kernels[platform], offset=offset)
    if mesh.size == 1:
        return run(q, k, v, sees)
    spread = math.prod(mesh.shape[axis] for axis in row_axes)
    rows = row_axes if q.shape[0] % spread == 0 else None
    is_cut = "tensor" not in row_axes and k.shape[2] % mesh.shape["tensor"] == 0
    heads = PartitionSpec(rows, None, "tensor" if is_cut else None)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(rows)),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, sees)


def attend_splash(
    q: Array, k: Array, v: Array, sees: Array, *, offset: int | None, is_interpreted: bool = False
) -> Array:
    """`attend_blockwise` on one TPU; lengths and head width are padded to multiples of 128.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    _, q_len, heads, dim = q.shape
    width = -(-dim // _LANES) * _LANES
    scale = np.asarray(dim**-0.5, q.dtype)
    q, k, v = (_pad(_pad(x, 1), 3, width) for x in (q * scale, k, v))
    shape = (q.shape[1], k.shape[1])
    one_head: splash_mask.Mask = splash_mask.FullMask(shape)
    if offset is not None:
        one_head = splash_mask.CausalMask(shape, offset=offset)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([one_head] * heads),
        block_sizes=_block_sizes(*shape),
        head_shards=1,
        q_seq_shards=1,
        interpret=is_interpreted,
    )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, H, T, A]
    key_segments = _pad(sees.astype(jnp.int32), 1)
    query_segments = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
    out: Array = jax.vmap(kernel)(q, k, v, splash.SegmentIds(query_segments, key_segments))
    return out.transpose(0, 2, 1, 3)[:, :q_len, :, :dim].astype(q.dtype)


def attend_cudnn(q: Array, k: Array, v: Array, sees: Array, *, offset: int | None) -> Array:
    """`attend_blockwise` on one GPU, masked by bias.

    Source: jax.nn.dot_product_attention with implementation="cudnn".
    """
    mask = sees[:, None, None]
    if offset is not None:
        order = np.arange(k.shape[1])[None] <= np.arange(q.shape[1])[:, None] + offset
        mask = mask & order[None, None]
    shape = (q.shape[0], 1, q.shape[1], k.shape[1])
    mask = jnp.broadcast_to(mask, shape)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _pad(x: Array, axis: int, size: int = 0) -> Array:
    """Zeros up to `size`, or to the next multiple of 128, on one axis."""
    size = size or -(-x.shape[axis] // _LANES) * _LANES
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _block_sizes(q_len: int, kv_len: int) -> splash.BlockSizes:
    q, kv = (next(b for b in _BLOCKS if size % b == 0) for size in (q_len, kv_len))
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
