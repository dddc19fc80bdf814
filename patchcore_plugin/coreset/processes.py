"""Processes that share the rows of one coreset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from patchcore_plugin.coreset.tuning import Tuning


class Shards:
    """The processes that share the rows of one coreset.

    Args:
        group: The processes; ``None`` for this process alone.

    Attributes:
        world: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.world = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate every process's tensor of the same shape in order of rank."""
        if self.world == 1:
            return values
        flat = values.contiguous().view(torch.uint8)  # any type, whatever the backend knows
        parts = [torch.empty_like(flat) for _ in range(self.world)]
        dist.all_gather(parts, flat, group=self.group)
        return torch.cat(parts).view(values.dtype)

    def merge(self, values: torch.Tensor) -> torch.Tensor:
        """Fill a tensor of which each process has some values, and zeros in place of the others'."""
        if self.world > 1:
            dist.all_reduce(values.view(torch.uint8), group=self.group)  # sums of bytes, all but one of them zero
        return values

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """Send the first process's tensor to all; the others pass one of the same shape to write to."""
        if self.world > 1:
            dist.broadcast(values, group_src=0, group=self.group)
        return values


def rows_of_all(points: torch.Tensor, numbers: torch.Tensor, shards: Shards, tuning: Tuning) -> torch.Tensor:
    """Rows of all processes' points; the same in every process.

    Args:
        points: This process's rows (N, D).
        numbers: Numbers of the wanted rows (K,), int64; rows are numbered through all processes in order of rank.
        shards: The processes.
        tuning: Sizes of the parts of the work.

    Returns:
        The wanted rows (K, D).
    """
    if shards.world == 1:
        return points.index_select(0, numbers)
    counts = shards.gather(torch.tensor([len(points)], device=points.device))
    numbers = numbers - counts[: shards.rank].sum()
    rows = points.new_zeros((len(numbers), points.shape[1]))
    mine = ((numbers >= 0) & (numbers < len(points))).nonzero().squeeze(1)
    for part in mine.split(tuning.rows_of_piece(points.shape[1])):
        rows[part] = points.index_select(0, numbers.index_select(0, part))
    return shards.merge(rows)
