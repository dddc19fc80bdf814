"""Patch embeddings of one training pass, within a bounded amount of memory."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.memory import RowCost, free_memory, plan_memory
from patchcore_plugin.coreset.processes import Shards, rows_of_all
from patchcore_plugin.coreset.products import full_float32
from patchcore_plugin.coreset.threads import threads_for
from patchcore_plugin.coreset.traversal import Traversal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

    from patchcore_plugin.coreset.sampler import GreedyCoreset
    from patchcore_plugin.coreset.tuning import Tuning

    FindOutliers = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)


class _Collected(NamedTuple):
    """What the processes have collected together.

    Attributes:
        rows: Rows that were appended.
        left: Rows that are left of them.
        error: Largest distance of any other row to one that is left, at most.
        columns: Values of a row.
        first: Number of this process's first row, through all processes.
        streamed: Whether any process had to reduce its rows.
    """

    rows: int
    left: int
    error: float
    columns: int
    first: int
    streamed: bool


class EmbeddingStore:
    """Collects embeddings in one matrix and reduces them to the coreset.

    Where all of them fit into the budget, the coreset is that of :class:`GreedyCoreset`, exactly. Otherwise the matrix is
    as large as the budget allows, and each time it is full its rows are reduced to a running coreset. First, rows within
    the present covering radius of the running coreset are dropped, and the others are covered farthest first. Where too
    many rows stay, all of them are reduced to half the matrix, which makes the radius grow. The last step picks the bank
    from what is left.

    This is merge-and-reduce for k-center, with a farthest-first traversal in each step, as in Gonzalez 1985. (A doubling
    algorithm, Charikar et al. 1997, has the better worst case, a factor of 8, but drops far more rows at each step.) A step
    that keeps at least as many rows as the bank has moves no row by more than twice the optimal radius for a bank of that
    size, and errors add up: after ``s`` reductions (of the process that made most) the covering radius is at most
    ``2 (s + 2)`` times the optimum. ``radius_`` is no worst case, but the sum of the radii that the steps did reach: no row
    that was ever appended, as rounded to ``dtype``, is farther from the bank.

    Args:
        sampler: Picks the bank; sets its size or radius.
        dtype: Type of the stored embeddings.
        expected_rows: Rows to come in all; ``None`` if unknown.
        budget: Bytes that the fit may take, its matrix and everything beside; ``None`` takes most of the free memory.
        processes: Processes that share this machine's memory.
        share: Share of the budget, or of the free memory, that this store may take beside others.

    Attributes:
        rows: Rows appended so far.
        reductions: How often rows had to be reduced to stay within the budget.
        radius_: Covering radius after :meth:`reduce_to_bank`, in feature units: exact without a reduction, else an upper
            bound.
        numbers_: Which rows the bank is made of, after :meth:`reduce_to_bank` (K,), int64, on the CPU. Rows are numbered as
            they were appended, through all processes in order of rank.
        outliers_: Vectors of the coreset that :meth:`reduce_to_bank` dropped.
    """

    def __init__(
        self,
        sampler: GreedyCoreset,
        dtype: torch.dtype = torch.float32,
        expected_rows: int | None = None,
        budget: float | None = None,
        processes: int = 1,
        share: float = 1,
    ) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.expected_rows = expected_rows
        self.budget = budget
        self.processes = processes
        self.share = share
        self.rows = 0
        self.reductions = 0
        self.radius_ = math.nan
        self.outliers_ = 0
        self.numbers_ = torch.empty(0, dtype=torch.int64)
        self._matrix: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None  # of the matrix's rows, once they have been moved
        self._kept = 0  # rows of the running coreset, at the start of the matrix
        self._filled = 0
        self._radius = float(sampler.radius or 0)  # of the running coreset
        self._error = 0.0

    def append(self, embeddings: torch.Tensor) -> None:
        """Add embeddings (M, D).

        Raises:
            UsageError: If the memory is far too small.
            ValueError: If the embeddings have another number of values than those before.
        """
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

    def reduce_to_bank(
        self, group: dist.ProcessGroup | None = None, find_outliers: FindOutliers | None = None
    ) -> torch.Tensor:
        """Reduce all rows, those of all processes in a group, to the coreset (K, D), and empty the store.

        Args:
            group: The processes.
            find_outliers: Called in each process with the coreset (K, D), the numbers of its rows (K,), the process's rows
                that are left (N, D), and their numbers (N,). Returns which vectors of the coreset are dropped (K,).

        Raises:
            ValueError: If no process has any row.
        """
        shards = Shards(group)
        collected = self._collected(shards)
        if not collected.rows:
            msg = "There are no embeddings to pick a memory bank from."
            raise ValueError(msg)
        if self._matrix is None:  # this process has none; others have
            self._matrix = torch.empty((0, collected.columns), dtype=self.dtype, device=self._device(shards))
        rows = self._matrix[: self._filled]
        picks, radius = self._pick(rows, collected, group)
        tuning = self.sampler.tuning_on(rows.device)
        bank = rows_of_all(rows, picks, shards, tuning)
        self.radius_ = collected.error + radius
        self.numbers_ = self._numbers_of(picks, collected, shards, tuning)
        self._warn(len(bank), collected)
        if find_outliers is not None:
            numbers = self.numbers_.to(bank.device)
            usual = ~find_outliers(bank, numbers, rows, self._numbers_left(collected))
            self.outliers_ = len(usual) - int(usual.sum())
            bank, self.numbers_ = bank[usual], self.numbers_[usual.cpu()]
        self._matrix = self._numbers = None
        self._filled = self._kept = 0
        return bank

    def _collected(self, shards: Shards) -> _Collected:
        """What the processes have collected, after a last reduction where they stream to a radius."""
        device = self._device(shards)
        streamed = bool(shards.gather(torch.tensor([self._kept], device=device)).any())
        if streamed and self.sampler.radius and self._filled > self._kept:
            self._reduce(final=True)
        columns = 0 if self._matrix is None else self._matrix.shape[1]
        facts = torch.tensor([[self.rows, self._filled, self._error, columns]], dtype=torch.float64, device=device)
        rows, filled, errors, columns = shards.gather(facts).T
        return _Collected(
            rows=int(rows.sum()),
            left=int(filled.sum()),
            error=float(errors.max()),
            columns=int(columns.max()),
            first=int(rows[: shards.rank].sum()),
            streamed=streamed,
        )

    def _pick(
        self, rows: torch.Tensor, collected: _Collected, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, float]:
        """Numbers of the bank's rows among those that are left, and the radius within which they cover those."""
        radius, wanted = self.sampler.radius, self.sampler.count(collected.rows)
        if collected.streamed and radius and wanted >= collected.left:
            return torch.arange(collected.left, device=rows.device), 0.0
        if collected.streamed:
            radius = None  # what is left of a stream covers all rows within the radius
        sampler = replace(self.sampler, ratio=None, size=min(wanted, collected.left), radius=radius)
        picks = sampler.fit(rows, group)
        return picks, sampler.radius_

    def _numbers_of(self, picks: torch.Tensor, collected: _Collected, shards: Shards, tuning: Tuning) -> torch.Tensor:
        """Numbers of picked rows as they were appended; where rows were reduced, those that are left are numbered anew."""
        if not collected.streamed:
            return picks.cpu()
        return rows_of_all(self._numbers_left(collected)[:, None], picks, shards, tuning)[:, 0].cpu()

    def _numbers_left(self, collected: _Collected) -> torch.Tensor:
        """Numbers of this process's rows that are left (N,), through all processes, as they were appended."""
        device = self._matrix.device
        numbers = torch.arange(self._filled, device=device) if self._numbers is None else self._numbers[: self._filled]
        return numbers + collected.first

    def _warn(self, size: int, collected: _Collected) -> None:
        """Warn of a bank that is smaller, or of a radius that is larger, than was asked for."""
        radius, wanted = self.sampler.radius, self.sampler.count(collected.rows)
        if collected.streamed and radius is None and wanted > collected.left == size:
            logger.warning(
                "The memory budget left room for %d patch embeddings, so the memory bank has %d instead of %d. Raise "
                "memory_budget, lower coreset_sampling_ratio, or halve the embeddings with embedding_dtype: float16.",
                collected.left, size, wanted,
            )  # fmt: skip
        if collected.streamed and radius is not None and self.radius_ > radius:
            logger.warning(
                "The memory budget was too small for a coreset radius of %.4g: patches lie within %.4g of the bank.",
                radius, self.radius_,
            )  # fmt: skip

    def _device(self, shards: Shards) -> torch.device:
        if self._matrix is not None:
            return self._matrix.device
        nccl = shards.group is not None and torch.distributed.get_backend(shards.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _allocate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Matrix for embeddings like these (M, D)."""
        # Apple's and some of Intel's GPUs have no float64, which the coreset needs
        device = embeddings.device if embeddings.device.type == "cuda" else torch.device("cpu")
        many = self.expected_rows or 2**20
        cost = RowCost(
            columns=embeddings.shape[1],
            value_bytes=self.dtype.itemsize,
            bank_share=min(0.5, self.sampler.count(many) * self.processes / many),  # each process gets the whole bank
            projected=self.sampler.projection is not None,
        )
        budget = None if self.budget is None else self.share * self.budget
        free = self.share * free_memory(device, self.processes)
        plan = plan_memory(cost, self.expected_rows, budget=budget, free=free)
        plan.log(logger)
        return torch.empty((plan.rows, cost.columns), dtype=self.dtype, device=device)

    def _reduce(self, *, final: bool = False) -> None:
        """Make room: cover the new rows within the present radius, or, if too many rows stay, enlarge the radius."""
        matrix, capacity = self._matrix[: self._filled], len(self._matrix)
        if self._numbers is None:
            self._numbers = torch.arange(capacity, device=matrix.device)
        room = (self._filled if final else capacity * 3 // 4) - self._kept
        with torch.inference_mode(), full_float32(matrix.device.type), threads_for(matrix):
            if not (self._radius and room > 0 and self._cover_new(matrix, room)):
                self._cover_all(matrix)

    def _cover_new(self, matrix: torch.Tensor, room: int) -> bool:
        """Keep up to ``room`` of the new rows, so that they cover the others; False where so few cannot."""
        tuning = self.sampler.tuning_on(matrix.device)
        kept, new = matrix[: self._kept], matrix[self._kept :]
        traversal = Traversal(new, self.sampler.random_state, tuning, seeds=kept)
        while len(traversal.picks) < room and traversal.advance(room, self._radius * self._radius):
            pass
        if math.sqrt(traversal.farthest) > self._radius:
            return False
        self._keep(traversal.picks + self._kept)
        self._error = max(self._error, self._radius)
        return True

    def _cover_all(self, matrix: torch.Tensor) -> None:
        """Keep so few of all rows that most of what follows needs no such reduction: the radius becomes large enough."""
        capacity = len(self._matrix)
        wanted = self.sampler.count(self.expected_rows or self.rows)
        size = min(max(capacity // 8, wanted), capacity // 2)
        traversal = Traversal(matrix, self.sampler.random_state, self.sampler.tuning_on(matrix.device))
        while len(traversal.picks) < size and traversal.advance(size, 0.0):
            pass
        reached = math.sqrt(traversal.farthest)
        self._kept = 0
        self._keep(traversal.picks)
        self._error += reached
        self._radius = max(self._radius, reached)
        self.reductions += 1
        logger.info("Reduced %d patch embeddings to %d, every other within %.4g.", len(matrix), self._kept, reached)

    def _keep(self, picks: torch.Tensor) -> None:
        """Move picked rows behind the running coreset; in order, so that no row is written over before it is read."""
        picks = picks.sort().values
        for part in picks.split(self.sampler.tuning_on(picks.device).rows_of_piece(self._matrix.shape[1])):
            place = slice(self._kept, self._kept + len(part))
            self._matrix[place] = self._matrix.index_select(0, part)
            self._numbers[place] = self._numbers.index_select(0, part)
            self._kept += len(part)
        self._filled = self._kept
