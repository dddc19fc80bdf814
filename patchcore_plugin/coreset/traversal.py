"""Farthest-first traversal in batches: the engine of :class:`~patchcore_plugin.coreset.sampler.GreedyCoreset`.

Every row knows its exact (float64) squared distance to the nearest center. The distance only shrinks as centers are added,
so it is an upper bound between two updates: the farthest rows become candidates, and picking goes on among them alone for
as long as the best candidate lies farther than the farthest row outside. Then all rows are brought up to date with the
whole batch of new centers. Picking among candidates is the same problem on fewer rows, so it is solved the same way, down
to a few hundred rows.

Clusters that a new center cannot reach are left out of the update: by the triangle inequality, a center that lies at least
twice the cluster's radius from the cluster's own center is nearer to none of its rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.clusters import ClusterReach, OrderedCenters
from patchcore_plugin.coreset.distances import Rows, candidates
from patchcore_plugin.coreset.processes import Shards
from patchcore_plugin.coreset.products import faster_dtype
from patchcore_plugin.coreset.rounding import Rounding
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    import torch.distributed as dist

    from patchcore_plugin.coreset.tuning import Tuning

_PRUNED_SHARE_NEEDED = 0.15  # of all pairs of block and new center; less is not worth the cost of pruning


class _Candidates(NamedTuple):
    """The farthest rows of one process or of all.

    Attributes:
        vectors: The rows (C, D).
        distances: Their squared distances to the nearest center (C,), float64; -1 where a process has fewer rows.
        numbers: Their numbers (C,), int64, through all processes.
        owners: Numbers of their nearest centers (C,), int64; 0 where those are not kept.
        outside: Largest squared distance of any other row; -1 for no other row.
    """

    vectors: torch.Tensor
    distances: torch.Tensor
    numbers: torch.Tensor
    owners: torch.Tensor
    outside: float


class Traversal:
    """A farthest-first traversal over the rows of all processes.

    Each process holds its own rows. In a round, the farthest rows of all are gathered, the first process picks among
    them, and every process updates its rows with the picks: three collectives a round, none a pick.

    Args:
        points: This process's rows (N, D).
        random_state: Seed of the starting row; ``None`` draws one.
        tuning: Sizes of the parts of the work.
        group: The processes; ``None`` for this process alone.
        seeds: Centers (S, D) to start from instead of a row; they are no picks.

    Attributes:
        picks: Numbers of the picked rows (K,), int64, in order; rows are numbered through all processes by rank.
        total: Number of the rows of all processes.
    """

    def __init__(
        self,
        points: torch.Tensor,
        random_state: int | None,
        tuning: Tuning,
        group: dist.ProcessGroup | None = None,
        seeds: torch.Tensor | None = None,
    ) -> None:
        self.shards = Shards(group)
        self.tuning = tuning
        device = points.device
        counts = self.shards.gather(torch.tensor([len(points)], device=device)).tolist()
        self.total, self.offset = sum(counts), sum(counts[: self.shards.rank])
        seeds = points[:0] if seeds is None else seeds
        rounding = _rounding([points, seeds], self.shards, tuning)
        # rows may belong to a seed, which has no number: then there are no clusters to keep
        self.rows = Rows(points, rounding, tuning, clusters=not len(seeds))
        # More candidates mean fewer, larger updates; picking among a small share of the rows costs little beside them.
        self.candidates = max(tuning.min_candidates, min(tuning.max_candidates, self.total // 32))
        # The product of a block with a larger batch would take much memory beside few rows.
        self.batch = max(tuning.min_candidates, min(tuning.max_batch, self.total // 200))
        self.picks = torch.empty(0, dtype=torch.int64, device=device)
        self._vectors: list[torch.Tensor] = []  # the centers, where other processes' rows are among them
        self._rank = self.picks  # place of each center in an order that puts near ones together
        self._pruning_centers = tuning.pruning_centers
        if len(seeds):
            for part in seeds.split(self.batch):
                self.rows.update(part)
        else:
            start, vector = self._start(random_state)
            self._add(start, vector, torch.zeros_like(start))

    def _start(self, random_state: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Number (1,) and vector (1, D) of the row farthest along a random direction, however the rows are shuffled."""
        points = self.rows.points
        direction = _random_direction(points.shape[1], random_state).to(points.device)
        slack = float(direction.abs().sum()) * (points.shape[1] + 16) * 2.0**-22
        number = torch.zeros(1, dtype=torch.int64, device=points.device)
        best = torch.full((1,), -math.inf, dtype=torch.float64, device=points.device)
        vector = points.new_zeros((1, points.shape[1]))
        piece = self.tuning.rows_of_piece(points.shape[1])
        for start in range(0, len(points), piece):
            part = points[start : start + piece]
            along = self.rows.rounding.scaled(part) @ direction.float()
            # float32 finds the few rows that can be the farthest, float64 decides
            few = (along >= along.max() - slack).nonzero().squeeze(1)
            values = (part.index_select(0, few).double() * direction).sum(1)
            if values.max() > best:
                best = values.max().view(1)
                row = few[values.argmax()].view(1)
                number, vector = row + start + self.offset, part.index_select(0, row)
        winner = self.shards.from_first(self.shards.gather(best).argmax().view(1))
        return self.shards.gather(number).index_select(0, winner), self.shards.gather(vector).index_select(0, winner)

    @property
    def farthest(self) -> float:
        """Largest squared distance of any row to its nearest center."""
        mine = self.rows.nearest.max().view(1) if len(self.rows.nearest) else self.rows.nearest.new_zeros(1)
        return float(self.shards.gather(mine).max())

    def advance(self, wanted: int, floor: float) -> bool:
        """One round: pick as many rows as the candidates allow.

        Args:
            wanted: Number of picks to stop at.
            floor: Squared distance at and below which no row is picked.

        Returns:
            Whether a row was picked; False when no row is left above ``floor``.
        """
        found = self._candidates()
        if float(found.distances.max()) <= floor:
            return False
        limit = min(wanted - len(self.picks), self.batch)
        batch = torch.full((limit + 1,), -1, dtype=torch.int64, device=found.vectors.device)
        if self.shards.rank == 0:
            rows = Rows(found.vectors, self.rows.rounding, self.tuning, found.distances)
            few = rows.farthest(limit, max(found.outside, floor))
            if not len(few):  # the candidates tie with a row outside them: one plain pick, the first of the farthest
                few = found.distances.argmax().view(1)
            batch[: len(few)] = few
        batch = self.shards.from_first(batch)
        batch = batch[batch >= 0]
        self._add(*(values.index_select(0, batch) for values in (found.numbers, found.vectors, found.owners)))
        return True

    def _candidates(self) -> _Candidates:
        """The farthest rows of all processes."""
        rows, world = self.rows, self.shards.world
        count = -(-self.candidates // world)
        mine, outside = candidates(rows.nearest, count) if len(rows.nearest) else (self.picks[:0], -1.0)
        owners = torch.zeros_like(mine) if rows.owner is None else rows.owner.index_select(0, mine)
        # One float64 matrix, so that one collective takes all; whole numbers below 2^53 are exact in it.
        facts = rows.nearest.new_full((count if world > 1 else len(mine), 4), -1)
        facts[: len(mine), :3] = torch.stack([rows.nearest.index_select(0, mine), mine + self.offset, owners], 1)
        facts[:, 3] = outside
        vectors = rows.points.new_zeros((len(facts), rows.points.shape[1]))
        vectors[: len(mine)] = rows.points.index_select(0, mine)
        distances, numbers, owners, outsides = self.shards.gather(facts).T.contiguous()
        return _Candidates(self.shards.gather(vectors), distances, numbers.long(), owners.long(), float(outsides.max()))

    def _add(self, numbers: torch.Tensor, vectors: torch.Tensor, owners: torch.Tensor) -> None:
        """Add centers.

        Args:
            numbers: Numbers of the picked rows (B,).
            vectors: The rows (B, D).
            owners: Numbers of the centers that the rows belonged to (B,).
        """
        before = len(self.picks)
        reach = self._reach() if len(numbers) >= self.tuning.pruning_batch else None
        self.rows.update(vectors, before, reach)
        if reach is not None and reach.compared > (1 - _PRUNED_SHARE_NEEDED) * len(reach) * len(numbers):
            self._pruning_centers = before + before // 2
        self.picks = torch.cat([self.picks, numbers])
        if self.shards.world > 1:
            self._vectors.append(vectors)
        # A new center stands next to the one that its row belonged to: this keeps near clusters together.
        places = self._rank.index_select(0, owners).double() + 0.5 if before else owners.double()
        places = torch.cat([self._rank.double(), places])
        self._rank = torch.empty_like(self.picks)
        self._rank[places.argsort(stable=True)] = torch.arange(len(self.picks), device=self.picks.device)

    def _reach(self) -> ClusterReach | None:
        """Which new centers can matter to which rows; None where finding that out is not worth it."""
        rows = self.rows
        if rows.owner is None or not len(rows.points) or len(self.picks) < self._pruning_centers:
            return None
        matrix, of_center = rows.points, self.picks
        if self.shards.world > 1:
            self._vectors = [torch.cat(self._vectors)]
            matrix, of_center = self._vectors[0], torch.arange(len(self.picks), device=self.picks.device)
        centers = OrderedCenters(self._rank, matrix, of_center)
        return ClusterReach(rows.nearest, rows.owner, rows.block, centers, rows.rounding, self.tuning)


def random_generator(random_state: int | None) -> torch.Generator:
    """Generator by a seed; ``None`` draws the seed."""
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    else:
        generator.manual_seed(int(random_state))
    return generator


def _random_direction(columns: int, random_state: int | None) -> torch.Tensor:
    return torch.randn(columns, dtype=torch.float64, generator=random_generator(random_state))


def _rounding(matrices: list[torch.Tensor], shards: Shards, tuning: Tuning) -> Rounding:
    """How the rows of some matrices, those of all processes, enter products."""
    columns = matrices[0].shape[1]
    sums = matrices[0].new_zeros(columns, dtype=torch.float64)
    count, largest = sums.new_zeros(1), sums.new_zeros(1)
    piece = tuning.rows_of_piece(columns)
    for part in (part for matrix in matrices for part in matrix.split(piece) if len(part)):
        wide = part if part.dtype == torch.float64 else part.float()
        sums += wide.sum(0)
        count += len(part)
        largest = torch.maximum(largest, torch.stack(wide.aminmax()).abs().amax().double())
    sums, count, largest = shards.gather(torch.cat([sums, count, largest])[None]).split([columns, 1, 1], 1)
    mean = (sums.sum(0) / count.sum()).float()
    largest = float(largest.max())
    if not math.isfinite(largest):
        msg = "embeddings hold NaN or infinite values; farthest-first distances are not defined on them."
        raise UsageError(msg)
    longest = (largest + float(mean.abs().max())) * math.sqrt(columns)
    if not longest <= torch.finfo(torch.float32).max / 4:
        msg = f"embeddings hold values up to {largest:.3g}, too large for distances; scale them down first."
        raise UsageError(msg)
    # Powers of two that a float32 can hold
    scale = 2.0 ** max(-120, min(120, -math.frexp(longest)[1])) if longest else 1.0
    return Rounding(mean, scale, tuning.product_dtype or faster_dtype(mean.device, columns, torch.get_num_threads()))
