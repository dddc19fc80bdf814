"""Sizes of the parts in which the coreset is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


@dataclass(frozen=True)
class Tuning:
    """Sizes of the parts in which the coreset is computed. They change its speed and memory, never its picks.

    The defaults are for CPUs.

    Attributes:
        block_rows: Rows of one matrix product. A CPU keeps the working set of a block in its cache; an accelerator needs
            large products.
        block_values: Values of a block's rows, at most.
        piece_values: Values of one temporary tensor. The first use of new memory costs more than the work on it, and a CPU
            gets new memory for every large tensor.
        segment_columns: Columns of a product whose minimum is looked at before the columns themselves.
        padding_columns: A product has a multiple of this many columns: kernels are compiled once for each shape.
        leaf_rows: Rows among which picks are made one by one.
        leaf_values: Values of those rows, at most.
        leaf_steps: Picks between two looks at their distances. A look makes an accelerator wait.
        min_candidates: Fewest candidates of a round.
        max_candidates: Most candidates of a round.
        max_batch: Most picks of a round.
        pruning_centers: Centers from which on clusters are pruned. The clusters of fewer centers are so wide that every new
            center reaches them.
        pruning_batch: New centers from which on clusters are pruned. Fewer are not worth sorting the rows.
        product_dtype: float32 or bfloat16: type of the matrix products. ``None`` takes the faster one.
    """

    block_rows: int = 2048
    block_values: int = 2**24
    piece_values: int = 2**18
    segment_columns: int = 64
    padding_columns: int = 256
    leaf_rows: int = 512
    leaf_values: int = 2**17
    leaf_steps: int = 32
    min_candidates: int = 512
    max_candidates: int = 16384
    max_batch: int = 4096
    pruning_centers: int = 512
    pruning_batch: int = 64
    product_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Sizes for a device."""
        return cls() if device.type == "cpu" else cls(block_rows=2**16, piece_values=2**24)

    def rows_of_piece(self, columns: int) -> int:
        """Rows of ``columns`` values to work on at a time, where the work makes temporary tensors."""
        return max(1, self.piece_values // columns)

    def rows_of_block(self, rows: int, columns: int) -> int:
        """Rows of a block of a matrix (rows, columns): a multiple of ``segment_columns``."""
        block = min(self.block_rows, max(1, self.block_values // columns), max(rows, 1))
        return -(-block // self.segment_columns) * self.segment_columns

    def rows_of_leaf(self, columns: int) -> int:
        """Rows of ``columns`` values among which picks are made one by one."""
        return min(self.leaf_rows, max(64, self.leaf_values // columns))
