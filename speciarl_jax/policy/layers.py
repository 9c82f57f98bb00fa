"""The layers that everything else is made of: linear with an optional adapter, norm, gated MLP."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

Vector = TypeVar("Vector", Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """`param` is how weights are stored, `compute` how activations are computed."""

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32


class LoRAParam(nnx.Param[Array]):
    """An adapter weight. Subclasses `nnx.Param`: filter by this class to train the adapter only."""


@jax.custom_vjp
def _matmul_2d(x: Float[Array, "T d_in"], w: Float[Array, "d_in d_out"]) -> Array:
    return x @ w


def _matmul_2d_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _matmul_2d_bwd(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, w = residuals
    return jnp.einsum("te,de->td", d_y, w), jnp.einsum("td,te->de", x, d_y)


_matmul_2d.defvjp(_matmul_2d_fwd, _matmul_2d_bwd)


def matmul(x: Float[Array, "... d_in"], w: Float[Array, "d_in d_out"]) -> Float[Array, "... d_out"]:
    """``x @ w`` as one plain product, forward and backward.

    Automatic differentiation of a product with several leading axes makes XLA on CPU transpose the
    incoming gradient element by element; written on [T, d] the same products run twice as fast.
    """
    return _matmul_2d(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[-1])


def last_axis(vector: Shaped[Vector, " d"], like: Shaped[Array, ...]) -> Shaped[Vector, "... d"]:
    """`vector` with leading axes of size one, so that nothing relies on silent rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """``y = x W + b``, plus ``scale * (x A) B`` once `speciarl_jax.policy.lora` has added A and B.

    Weights are stored [in, out] (the transpose of torch's). Without `lora_a` the layer is the base
    model's own, which is how the reference policy is obtained: same arrays, no adapter.
    """

    lora_a: LoRAParam
    lora_b: LoRAParam

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool, dtypes: Dtypes, rngs: nnx.Rngs
    ) -> None:
        """Draws the kernel from N(0, 0.02), as the released configuration's initializer_range."""
        kernel_init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), dtypes.param)
        )
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), dtypes.param))
        self.use_bias = use_bias
        self.dtype = dtypes.compute
        self.lora_scale = 0.0

    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        """Applies the map in the compute dtype."""
        x = x.astype(self.dtype)
        y = matmul(x, self.kernel[...].astype(self.dtype))
        if self.use_bias:
            y = y + last_axis(self.bias[...].astype(self.dtype), y)
        if self.lora_scale:
            low = matmul(x, self.lora_a[...].astype(self.dtype))  # [..., r]
            y = y + matmul(low, self.lora_b[...].astype(self.dtype)) * self.lora_scale
        return y


class RMSNorm(nnx.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the mean in float32.

    Source: transformers Qwen2_5_VLRMSNorm, rounding to the input dtype before the weight included.
    """

    def __init__(self, size: int, eps: float, *, dtypes: Dtypes) -> None:
        """Weights start at one."""
        self.weight = nnx.Param(jnp.ones((size,), dtypes.param))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis and keeps the dtype."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return last_axis(self.weight[...].astype(x.dtype), x) * (x32 * scale).astype(x.dtype)


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; the vision tower's has biases, the language model's not."""

    def __init__(
        self, size: int, inner_size: int, *, use_bias: bool, dtypes: Dtypes, rngs: nnx.Rngs
    ) -> None:
        """Creates the three projections."""

        def make(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, use_bias=use_bias, dtypes=dtypes, rngs=rngs)

        self.gate_proj = make(size, inner_size)
        self.up_proj = make(size, inner_size)
        self.down_proj = make(inner_size, size)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the block."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
