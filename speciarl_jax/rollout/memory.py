"""How many bytes a rollout needs on a device, counted; and how many prompts fit a limit.

Caches are counted exactly. What a program needs besides (activations of the prefill, logits of a
decode step) is counted by its largest arrays and checked against XLA's own figure in a test.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from speciarl_jax.arch import TextArch
from speciarl_jax.config.schema import RolloutConfig
from speciarl_jax.rollout.layout import column_sizes, next_rows, row_sizes

# Completion lengths of a typical step: log-normal. Assumed, and frozen: the tables of docs/scale.md
# are compared over months.
MEDIAN_TOKENS, P95_TOKENS = 120, 600
_MARGIN = 1.5  # rows that a wave has room for, over those that are expected to be left
_MIB = 2**20
_LOGIT_ARRAYS = 4  # float32 [R, V] alive at once: logits, log-probs, weights, their running sum
_SORT_ARRAYS = 3  # more of them while top-p, top-k or min-p cut


@dataclasses.dataclass(frozen=True)
class RolloutShape:
    """What the bytes of a rollout depend on, besides the model.

    Attributes:
        config: the recipe's rollout section.
        num_prompts, group_size: P prompts of the batch (or wave), G answers each.
        prompt_tokens: padded prompt length S.
        compute_bytes: of one activation, 4 or 2.
        num_shards: over which prompts are spread (data x fsdp of this process).
        tensor: over which heads are spread.
        truncates: top-p, top-k or min-p is on.
        is_unrolled: caches are stored layer by layer, see `Placement`.
        has_few_sizes: rows and columns come in few sizes, see `Placement`.
    """

    config: RolloutConfig
    num_prompts: int
    group_size: int
    prompt_tokens: int
    compute_bytes: int
    num_shards: int = 1
    tensor: int = 1
    truncates: bool = False
    is_unrolled: bool = False
    has_few_sizes: bool = False

    @property
    def columns(self) -> list[int]:
        """Sizes of the own cache, in tokens."""
        limit = self.config.max_completion_tokens
        return column_sizes(
            self.config.chunk_tokens, limit, self.config.compact, self.has_few_sizes
        )


@dataclasses.dataclass(frozen=True)
class RolloutBytes:
    """Bytes on one device at one number of rows and columns, weights and image table left out.

    Attributes:
        prompt_kv: keys and values of the prompts.
        own_kv: of all rows.
        moving: the second copy while rows or columns reach this size or leave it.
        decode_step: logits, what sampling makes of them, and one layer of the caches.
        prefill: activations and scores while prompts are read, and their cache before it is cut
            into layers.
    """

    prompt_kv: int
    own_kv: int
    moving: int
    decode_step: int
    prefill: int

    @property
    def peak(self) -> int:
        """The largest sum of what exists at the same time."""
        decoding = self.own_kv + max(self.moving, self.decode_step)
        return self.prompt_kv + max(self.prefill, decoding)


def rollout_bytes(
    arch: TextArch, shape: RolloutShape, per_shard: int = 0, columns: int = 0
) -> RolloutBytes:
    """Counts the bytes of a rollout on one device.

    Args:
        arch: of the language model.
        shape: what the bytes depend on.
        per_shard: rows of a shard; 0 for all.
        columns: of their own caches; 0 for the limit.
    """
    config = shape.config
    prompts = shape.num_prompts // shape.num_shards
    full = prompts * shape.group_size
    rows = per_shard or full
    token_bytes = kv_token_bytes(arch, shape)
    sizes = shape.columns
    columns = columns or sizes[-1]
    own = rows * columns * token_bytes
    moving = 0
    if config.compact:
        smaller = next_rows(rows, full, shape.has_few_sizes) * columns
        narrower = rows * [0, *sizes][sizes.index(columns)]
        moving = max(smaller, narrower) * token_bytes
    logit_arrays = _LOGIT_ARRAYS + (_SORT_ARRAYS if shape.truncates else 0)
    drawn = -(-rows // shape.tensor)  # rows whose token a device draws
    heads, inner = arch.num_heads // shape.tensor, arch.intermediate_size // shape.tensor
    activations = prompts * shape.prompt_tokens * shape.compute_bytes
    scores = prompts * heads * shape.prompt_tokens**2 * 4
    prompt_kv = prompts * shape.prompt_tokens * token_bytes
    one_layer = (prompt_kv + own) // arch.num_layers
    unstacking = prompt_kv if shape.is_unrolled else 0
    return RolloutBytes(
        prompt_kv=prompt_kv,
        own_kv=own,
        moving=moving,
        decode_step=logit_arrays * drawn * arch.vocab_size * 4 + one_layer,
        prefill=max(activations * (3 * arch.hidden_size + 2 * inner), 2 * scores) + unstacking,
    )


def kv_token_bytes(arch: TextArch, shape: RolloutShape) -> int:
    """Keys and values of one token in all layers, on one device."""
    is_int8 = shape.config.kv_cache_dtype == "int8"
    head = arch.head_dim + 4 if is_int8 else arch.head_dim * shape.compute_bytes
    return 2 * arch.num_layers * arch.num_kv_heads * head // shape.tensor


def rows_that_fit(arch: TextArch, shape: RolloutShape, columns: int) -> int:
    """The most rows of a shard, of the sizes of a wave, that may have so many columns.

    0 if not even the fewest may, so ``rollout.max_cache_mb`` is too low for the wave.
    """
    full = shape.num_prompts // shape.num_shards * shape.group_size
    limit_mb = shape.config.max_cache_mb  # of one device; 0 for no limit
    for rows in row_sizes(full, shape.has_few_sizes):
        found = rollout_bytes(arch, shape, rows, columns)
        if not limit_mb or found.peak <= limit_mb * _MIB:
            return rows
    return 0


def expected_share(tokens: int) -> float:
    """Share of answers longer than `tokens`, by the assumed log-normal lengths."""
    normal = statistics.NormalDist()
    sigma = math.log(P95_TOKENS / MEDIAN_TOKENS) / normal.inv_cdf(0.95)
    return 1 - normal.cdf(math.log(tokens / MEDIAN_TOKENS) / sigma) if tokens else 1.0


def prompts_per_wave(arch: TextArch, shape: RolloutShape) -> int:
    """Prompts of a batch that are sampled at once so that the peak stays below max_cache_mb.

    Where rows may leave the batch (``rollout.compact``), room for answers of expected lengths and
    half as many again is enough: what exceeds it waits on the host, see `rollout.spill`.

    Returns:
        A multiple of `shape.num_shards`: all prompts, or equal waves as few as possible.

    Raises:
        ValueError: not even one prompt per shard fits; the message names the numbers.
    """
    limit_mb = shape.config.max_cache_mb
    per_shard = shape.num_prompts // shape.num_shards
    for num_waves in range(1, per_shard + 1):
        wave = -(-per_shard // num_waves) * shape.num_shards
        if _fits(arch, dataclasses.replace(shape, num_prompts=wave)):
            return wave
    one = dataclasses.replace(shape, num_prompts=shape.num_shards)
    sizes = row_sizes(shape.group_size, shape.has_few_sizes)
    fewest = sizes[-1] if shape.config.compact else 0
    found = rollout_bytes(arch, one, fewest)
    raise ValueError(
        f"rollout.max_cache_mb={limit_mb}: one prompt of {shape.prompt_tokens} tokens with "
        f"{fewest or shape.group_size} answers at a time of up to "
        f"{shape.config.max_completion_tokens} tokens needs "
        f"{found.peak / _MIB:.1f} MiB a device (prompt cache {found.prompt_kv / _MIB:.1f}, own "
        f"caches {found.own_kv / _MIB:.1f}, their copy {found.moving / _MIB:.1f}, decode step "
        f"{found.decode_step / _MIB:.1f}, prefill {found.prefill / _MIB:.1f}); raise it, or lower "
        "rollout.group_size or rollout.max_completion_tokens, or set rollout.kv_cache_dtype=int8"
    )


def _fits(arch: TextArch, shape: RolloutShape) -> bool:
    """Whether a wave fits at expected lengths, and its fewest rows at the limit."""
    full = shape.num_prompts // shape.num_shards * shape.group_size
    sizes = shape.columns
    for narrower, columns in zip([0, *sizes], sizes, strict=False):
        expected = min(full, math.ceil(_MARGIN * full * expected_share(narrower)))
        if rows_that_fit(arch, shape, columns) < expected:
            return False
    return rows_that_fit(arch, shape, sizes[-1]) > 0
