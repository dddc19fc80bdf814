"""Memory of a fit: how much is free, and how many embeddings a budget holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from patchcore_plugin.errors import UsageError

GIB = 2**30

CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files with a container's memory limit, and with what it uses: those of control groups of version 2 and of version 1."""

MIN_STREAMED_ROWS = 1024
"""Fewest rows of a matrix that embeddings are streamed through."""

_STATE_BYTES = 48  # that the coreset keeps for each row, at most
_NUMBER_BYTES = 8  # more for each row of a stream: which row it is
_BUFFER_SHARE = 0.1  # of the budget, for what does not grow with the rows
_FREE_MEMORY_SHARE = 0.8  # that a fit takes where no budget is given


def free_memory(
    device: torch.device, processes: int = 1, container_files: Sequence[tuple[str | Path, str | Path]] = CONTAINER_FILES
) -> int:
    """Bytes that a process may still take on a device.

    Args:
        device: The device.
        processes: Processes that share this machine's memory.
        container_files: Pairs of files with the limit and the use of memory; absent ones count for nothing.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in container_files:
        with suppress(OSError, ValueError):  # another system has no such file, or the word "max" in it
            left = int(Path(limit).read_text("ascii")) - int(Path(used).read_text("ascii"))
            # files that were read count as used, but make room when it is needed
            cached = re.findall(
                r"^(?:in)?active_file (\d+)$", Path(used).with_name("memory.stat").read_text("ascii"), re.MULTILINE
            )
            free = min(free, left + sum(map(int, cached)))
    return max(0, free) // processes


@dataclass(frozen=True)
class RowCost:
    """Memory that a fit takes for each embedding.

    Attributes:
        columns: Values of an embedding.
        value_bytes: Bytes of a value.
        bank_share: Share of the rows that this machine's banks have.
        projected: Whether picking keeps a projection of the rows too.
    """

    columns: int
    value_bytes: int
    bank_share: float
    projected: bool

    @property
    def row(self) -> int:
        """Bytes of the embedding itself."""
        return self.columns * self.value_bytes

    @property
    def kept(self) -> float:
        """Bytes where all embeddings are kept until the coreset is picked."""
        return self.row * (1 + self.bank_share) + _STATE_BYTES + (4 * self.columns if self.projected else 0)

    @property
    def streamed(self) -> float:
        """Bytes where the coreset is kept up to date while embeddings come."""
        return self.kept + _NUMBER_BYTES


@dataclass(frozen=True)
class MemoryPlan:
    """How many embeddings a store holds at a time.

    Attributes:
        rows: Rows of the store's matrix.
        cost: Memory for each row.
        budget: Bytes that the fit may take.
        given: Whether the user set the budget.
        expected_rows: Rows to come in all; None if unknown.
    """

    rows: int
    cost: RowCost
    budget: float
    given: bool
    expected_rows: int | None

    @property
    def streams(self) -> bool:
        """Whether the coreset is kept up to date while embeddings come, as far as is known."""
        return self.expected_rows is None or self.expected_rows > self.rows

    def log(self, logger: logging.Logger) -> None:
        """Say what the plan means for the coreset; a warning where the user asked for nothing of the kind."""
        columns, budget, expected = self.cost.columns, self.budget / GIB, self.expected_rows
        if not self.streams:
            logger.info(
                "Collecting %d patch embeddings of %d values: %.2f GiB, and the fit may take %.2f GiB. The coreset will be "
                "exact.",
                expected, columns, expected * self.cost.row / GIB, budget,
            )  # fmt: skip
        elif expected is None:
            logger.info(
                "The number of patch embeddings is not known. Should they be more than %d (%d values each, in %.2f GiB), "
                "the coreset is kept up to date while they come.",
                self.rows, columns, budget,
            )  # fmt: skip
        else:
            logger.log(
                logging.INFO if self.given else logging.WARNING,
                "%d patch embeddings of %d values do not fit into %.2f GiB: the coreset is kept up to date while they come, "
                "%d at a time, and will be near the exact one. More memory, or embedding_dtype: float16, makes it exact.",
                expected, columns, budget, self.rows,
            )  # fmt: skip


def plan_memory(cost: RowCost, expected_rows: int | None, *, budget: float | None, free: float) -> MemoryPlan:
    """Plan a store's matrix.

    Args:
        cost: Memory for each row.
        expected_rows: Rows to come in all; ``None`` if unknown.
        budget: Bytes that the fit may take; ``None`` takes most of the free memory.
        free: Free memory in bytes.

    Raises:
        UsageError: If the memory holds fewer rows than a streamed fit needs.
    """
    given = budget is not None
    budget = budget if given else free * _FREE_MEMORY_SHARE
    usable = budget * (1 - _BUFFER_SHARE)
    capacity = int(usable / cost.kept)
    if expected_rows is not None and expected_rows <= capacity:
        # no fewer than are worth streaming through, should more come than expected
        rows = max(expected_rows, min(capacity, MIN_STREAMED_ROWS))
        return MemoryPlan(rows, cost, budget, given, expected_rows)
    rows = int(usable / cost.streamed)
    if rows < MIN_STREAMED_ROWS:
        raise UsageError(_too_little(rows, cost, budget, given=given))
    return MemoryPlan(rows, cost, budget, given, expected_rows)


def _too_little(rows: int, cost: RowCost, budget: float, *, given: bool) -> str:
    least = MIN_STREAMED_ROWS * cost.streamed / (1 - _BUFFER_SHARE) / GIB
    if given:
        memory = f"A memory budget of {budget / GIB:.3g} GiB"
        way_out = f"Raise memory_budget to at least {least:.3g}, or leave it out to use the free memory."
    else:
        memory = f"The free memory, of which {budget / GIB:.3g} GiB may be used,"
        way_out = f"Free at least {least / _FREE_MEMORY_SHARE:.3g} GiB, or use fewer processes."
    return (
        f"{memory} holds {rows} patch embeddings of {cost.columns} values, fewer than the {MIN_STREAMED_ROWS} that a "
        f"streamed fit needs. {way_out}"
    )
