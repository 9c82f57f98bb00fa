"""Prompts of a batch, padded to common shapes."""

from __future__ import annotations

import dataclasses

import numpy as np

from speciarl_jax.data.images import VisionArrays


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Everything the policy needs about P prompts, as padded host arrays.

    Padding rows (``is_real`` False) repeat no example: their arrays are padding and their
    results are discarded. Prompts are left-aligned; masks follow from `prompt_lengths`.

    Attributes:
        prompt_ids, ground_truths, datasets, images: length P host lists (images as bytes).
        tokens: [P, S] int32, image placeholder runs expanded to M tokens; pad id past the length.
        prompt_lengths: [P] int32.
        positions: [P, 3, S] int32 M-RoPE ids (t, h, w).
        position_deltas: [P] int32; M-RoPE id of completion token c is length + delta + c.
        image_rows: [P, S] int32 row in the table of the prompt's own images (its slots one after
            the other, M merged tokens each), -1 for text; see `table_rows`.
        vision: arrays for the vision tower, see `speciarl_jax.data.images.VisionArrays`.
        global_index: [P] int64 position of each row in the run's global order, >= 0; padding rows
            have one too.
        is_real: [P] bool; False for a padding row: empty ids, one pad token, no image.
    """

    prompt_ids: list[str]
    ground_truths: list[str]
    datasets: list[str]
    images: list[bytes]
    tokens: np.ndarray
    prompt_lengths: np.ndarray
    positions: np.ndarray
    position_deltas: np.ndarray
    image_rows: np.ndarray
    vision: VisionArrays
    global_index: np.ndarray
    is_real: np.ndarray

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.prompt_ids)

    def table_rows(self, num_rows: int, num_blocks: int = 1) -> np.ndarray:
        """`image_rows` in one table of all images, or within equal blocks of it.

            prompt     0        1        2        3
            table   | a a a | b b b | c c c | d d d |    num_rows = 12, one block: c starts at 6
            blocks  | a a a | b b b |, | c c c | d d d |             two blocks: c starts at 0

        Args:
            num_rows: of the table, I*M.
            num_blocks: parts that the prompts are cut into, for tables that lie with their prompts.

        Returns:
            [P, S] int32, -1 for text.
        """
        prompt = np.arange(self.num_prompts) % (self.num_prompts // num_blocks)
        first = prompt * (num_rows // self.num_prompts)
        rows = np.where(self.image_rows >= 0, self.image_rows + first[:, None], -1)
        return rows.astype(np.int32)
