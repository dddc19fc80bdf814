"""Patch embeddings of one training pass, within a bounded amount of memory."""

from __future__ import annotations

import logging
import math
import re
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from patchcore_plugin.coreset.distances import full_float32
from patchcore_plugin.coreset.sampler import GreedyCoreset
from patchcore_plugin.coreset.traversal import Shards, Traversal, rows_of_all

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

GIB = 2**30
_STATE = 48  # bytes that the coreset keeps for each row, at most
_NUMBER = 8  # bytes more where rows are moved: which row it is
_BUFFERS = 0.1  # share of the budget for what does not grow with the rows
_DEFAULT_SHARE = 0.8  # of the free memory
_SMALLEST = 1024  # rows of a matrix that is worth streaming through
_CONTAINER = [  # a container's limit, and what it uses, in control groups of version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


class EmbeddingStore:
    """Collects embeddings in one matrix and reduces them to the coreset.

    Where all of them fit into the budget, the coreset is that of :class:`GreedyCoreset`, exactly. Otherwise the matrix is
    as large as the budget allows, and each time it is full its rows are reduced to a running coreset: first, rows within
    the present covering radius of the running coreset are dropped, and the others are covered farthest first; where too
    many rows stay, all of them are reduced to half the matrix, which makes the radius grow. The last step picks the bank
    from what is left.

    This is merge-and-reduce for k-center (a farthest-first traversal in each step, as in Gonzalez 1985; a doubling
    algorithm, Charikar et al. 1997, has the better worst case, a factor of 8, but drops far more rows at each step). A
    step that keeps at least as many rows as the bank has moves no row by more than twice the optimal radius for a bank
    of that size, and errors add up: after ``s`` reductions (of the process that made most) the covering radius is at
    most ``2 (s + 2)`` times the optimum. ``radius_`` is no worst case, but the sum of the radii that the steps did reach:
    no row that was ever appended, as rounded to ``dtype``, is farther from the bank.

    Args:
        sampler: Picks the bank; sets its size or radius.
        dtype: Type of the stored embeddings.
        expected_rows: Rows to come in all; ``None`` if unknown.
        budget: Bytes that the fit may take, its matrix and everything beside; ``None`` takes most of the free memory.
        processes: Processes that share this machine's memory.

    Attributes:
        rows: Rows appended so far.
        reductions: How often rows had to be reduced to stay within the budget.
        radius_: Covering radius after :meth:`bank`, in feature units: exact without a reduction, else an upper bound.
        numbers_: Which rows the bank is made of, after :meth:`bank` (K,), int64, on the CPU. Rows are numbered as they were
            appended, through all processes in order of rank.
    """

    def __init__(
        self,
        sampler: GreedyCoreset,
        dtype: torch.dtype = torch.float32,
        expected_rows: int | None = None,
        budget: float | None = None,
        processes: int = 1,
    ) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.expected_rows = expected_rows
        self.budget = budget
        self.processes = processes
        self.rows = 0
        self.reductions = 0
        self.radius_ = math.nan
        self.numbers_ = torch.empty(0, dtype=torch.int64)
        self._matrix: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None  # of the matrix's rows, once they have been moved
        self._kept = 0  # rows of the running coreset, at the start of the matrix
        self._filled = 0
        self._radius = float(sampler.radius or 0)
        self._error = 0.0

    def append(self, embeddings: torch.Tensor) -> None:
        """Add embeddings (M, D)."""
        if self._matrix is None:
            self._matrix = self._allocate(embeddings)
        if embeddings.shape[1] != self._matrix.shape[1]:
            msg = f"Embeddings of {embeddings.shape[1]} values do not go with those of {self._matrix.shape[1]} before."
            raise ValueError(msg)
        while len(embeddings):
            if self._filled == len(self._matrix):
                self._reduce()
            part = embeddings[: len(self._matrix) - self._filled]
            place = slice(self._filled, self._filled + len(part))
            self._matrix[place] = part
            if self._numbers is not None:
                torch.arange(self.rows, self.rows + len(part), out=self._numbers[place])
            self.rows += len(part)
            self._filled += len(part)
            embeddings = embeddings[len(part) :]

    def bank(self, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """The coreset (K, D) of all rows, those of all processes in a group. The store is empty afterwards.

        Raises:
            ValueError: If no process has any row.
        """
        shards = Shards(group)
        radius = self.sampler.radius
        streamed = bool(shards.gather(torch.tensor([self._kept], device=self._device(shards))).any())
        if streamed and radius and self._filled > self._kept:
            self._reduce(final=True)
        facts = [self.rows, self._filled, self._error, 0 if self._matrix is None else self._matrix.shape[1]]
        facts = shards.gather(torch.tensor([facts], dtype=torch.float64, device=self._device(shards)))
        total, left, width = int(facts[:, 0].sum()), int(facts[:, 1].sum()), int(facts[:, 3].max())
        if not total:
            msg = "There are no embeddings to pick a memory bank from."
            raise ValueError(msg)
        if self._matrix is None:  # this process has none; others have
            self._matrix = torch.empty((0, width), dtype=self.dtype, device=self._device(shards))
        wanted, rows = self.sampler.count(total), self._matrix[: self._filled]
        self.radius_ = float(facts[:, 2].max())
        if streamed and radius and wanted >= left:
            picks = torch.arange(left, device=rows.device)
        else:
            final = GreedyCoreset(
                size=min(wanted, left),
                radius=None if streamed else radius,  # what is left of a stream covers all rows within the radius
                random_state=self.sampler.random_state,
                progress=self.sampler.progress,
                projection=self.sampler.projection,
            )
            picks = final.fit(rows, group)
            self.radius_ += final.radius_
        bank = rows_of_all(rows, picks, shards)
        if streamed:  # what is left is numbered otherwise than what was appended
            first = int(facts[: shards.rank, 0].sum())
            numbers = torch.arange(self._filled, device=rows.device) if self._numbers is None else self._numbers
            self.numbers_ = rows_of_all((numbers[: self._filled] + first)[:, None], picks, shards)[:, 0].cpu()
        else:
            self.numbers_ = picks.cpu()
        if streamed and radius is None and wanted > left == len(bank):
            logger.warning(
                "The memory budget left room for %d patch embeddings, so the memory bank has %d instead of %d. Raise "
                "memory_budget, lower coreset_sampling_ratio, or halve the embeddings with embedding_dtype: float16.",
                left, len(bank), wanted,
            )  # fmt: skip
        if streamed and radius is not None and self.radius_ > radius:
            logger.warning(
                "The memory budget was too small for a coreset radius of %.4g: patches lie within %.4g of the bank.",
                radius, self.radius_,
            )  # fmt: skip
        self._matrix = self._numbers = None
        self._filled = self._kept = 0
        return bank

    def _device(self, shards: Shards) -> torch.device:
        if self._matrix is not None:
            return self._matrix.device
        nccl = shards.group is not None and torch.distributed.get_backend(shards.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _allocate(self, embeddings: torch.Tensor) -> torch.Tensor:
        columns = embeddings.shape[1]
        # Apple's and some of Intel's GPUs have no float64, which the coreset needs
        device = embeddings.device if embeddings.device.type == "cuda" else torch.device("cpu")
        budget = free_memory(device, self.processes) * _DEFAULT_SHARE if self.budget is None else self.budget
        row = columns * torch.empty(0, dtype=self.dtype).element_size()
        needed = self.expected_rows
        many = needed or 2**20
        bank = min(0.5, self.sampler.count(many) * self.processes / many)  # each process gets the whole of it
        whole = row * (1 + bank) + _STATE + (4 * columns if self.sampler.projection is not None else 0)
        capacity = int(budget * (1 - _BUFFERS) / whole)
        if needed is not None and needed <= capacity:
            logger.info(
                "Collecting %d patch embeddings of %d values: %.2f GiB, and the fit may take %.2f GiB. The coreset will be "
                "exact.",
                needed, columns, needed * row / GIB, budget / GIB,
            )  # fmt: skip
            # no fewer than are worth streaming through, should more come than expected
            rows = max(needed, min(capacity, _SMALLEST))
            return torch.empty((rows, columns), dtype=self.dtype, device=device)
        whole += _NUMBER
        capacity = int(budget * (1 - _BUFFERS) / whole)
        if capacity < _SMALLEST:
            least = _SMALLEST * whole / (1 - _BUFFERS) / GIB
            given = f"A memory budget of {budget / GIB:.3g} GiB"
            way_out = f"Raise memory_budget to at least {least:.3g}, or leave it out to use the free memory."
            if self.budget is None:
                given = f"The free memory, of which {budget / GIB:.3g} GiB may be used,"
                way_out = f"Free at least {least / _DEFAULT_SHARE:.3g} GiB, or use fewer processes."
            msg = (
                f"{given} holds {capacity} patch embeddings of {columns} values, fewer than the {_SMALLEST} that a streamed "
                f"fit needs. {way_out}"
            )
            raise ValueError(msg)
        if needed is None:
            message = (
                "The number of patch embeddings is not known. Should they be more than %d (%d values each, in %.2f GiB)"
            )
            logger.info(message + ", the coreset is kept up to date while they come.", capacity, columns, budget / GIB)
        else:
            # whoever set no budget did not ask for it
            logger.log(
                logging.WARNING if self.budget is None else logging.INFO,
                "%d patch embeddings of %d values do not fit into %.2f GiB: the coreset is kept up to date while they come, "
                "%d at a time, and will be near the exact one. More memory, or embedding_dtype: float16, makes it exact.",
                needed, columns, budget / GIB, capacity,
            )  # fmt: skip
        return torch.empty((capacity, columns), dtype=self.dtype, device=device)

    def _reduce(self, *, final: bool = False) -> None:
        """Make room: cover the new rows within the present radius, or, if too many rows stay, enlarge the radius."""
        matrix, capacity = self._matrix[: self._filled], len(self._matrix)
        if self._numbers is None:
            self._numbers = torch.arange(capacity, device=matrix.device)
        room = (self._filled if final else capacity * 3 // 4) - self._kept
        with torch.inference_mode(), full_float32(matrix.device.type):
            if self._radius and room > 0:
                new = Traversal(matrix[self._kept :], self.sampler.random_state, seeds=matrix[: self._kept])
                while len(new.picks) < room and new.advance(room, self._radius * self._radius):
                    pass
                if math.sqrt(new.farthest) <= self._radius:
                    self._keep(new.picks + self._kept)
                    self._error = max(self._error, self._radius)
                    return
                del new
            # Few rows make the radius large enough for most of what follows, which then needs no further reduction.
            wanted = self.sampler.count(self.expected_rows or self.rows)
            size = min(max(capacity // 8, wanted), capacity // 2)
            every = Traversal(matrix, self.sampler.random_state)
            while len(every.picks) < size and every.advance(size, 0.0):
                pass
            self._kept = 0
            self._keep(every.picks)
            reached = math.sqrt(every.farthest)
        self._error += reached
        self._radius = max(self._radius, reached)
        self.reductions += 1
        logger.info("Reduced %d patch embeddings to %d, every other within %.4g.", len(matrix), self._kept, reached)

    def _keep(self, picks: torch.Tensor) -> None:
        """Move picked rows behind the running coreset; in order, so that no row is written over before it is read."""
        picks = picks.sort().values
        for part in picks.split(max(1, 2**18 // self._matrix.shape[1])):
            place = slice(self._kept, self._kept + len(part))
            self._matrix[place] = self._matrix.index_select(0, part)
            self._numbers[place] = self._numbers.index_select(0, part)
            self._kept += len(part)
        self._filled = self._kept


def check_budget(value: Any) -> None:
    """Raise a ValueError unless ``value`` is a finite number of GiB above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        msg = (
            f"memory_budget must be a number of GiB above 0, got {value!r}. 4 lets the embeddings and the coreset take "
            "4 GiB per process; leave it out to use the free memory."
        )
        raise ValueError(msg)


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a process may still take on a device, as one of several processes on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used in _CONTAINER:
        with suppress(OSError, ValueError):  # another system has no such file, or the word "max" in it
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            # files that were read count as used, but make room when it is needed
            cached = re.findall(r"^(?:in)?active_file (\d+)$", Path(used).with_name("memory.stat").read_text(), re.MULTILINE)
            free = min(free, left + sum(map(int, cached)))
    return max(0, free) // processes
