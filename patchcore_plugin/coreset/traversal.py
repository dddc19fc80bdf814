"""Farthest-first traversal in batches: the engine of :class:`~patchcore_plugin.coreset.sampler.GreedyCoreset`.

Every row knows its exact (float64) squared distance to the nearest centre. It only shrinks as centres are added, so it
is an upper bound between two updates: the farthest rows become candidates, and picking goes on among them alone for as
long as the best candidate lies farther than the farthest row outside. Then all rows are brought up to date with the
whole batch of new centres. Picking among candidates is the same problem on fewer rows, so it is solved the same way,
down to a few hundred rows.

Clusters that a new centre cannot reach (triangle inequality: it lies at least twice the cluster's radius from its
centre) are left out of the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from patchcore_plugin.coreset.distances import Centres, Lens, Rows, candidates, padded, piece, product_type

_MIN_CANDIDATES = 512
_MAX_CANDIDATES = 16384
_MAX_BATCH = 4096
_PRUNE_FROM = 512  # centres; below, a cluster is too wide to be out of reach
_PRUNE_BATCH = 64  # picks; fewer are not worth sorting the rows


class ClusterReach:
    """Which new centres can lie nearer to some row of a block than the row's own centre.

    A new centre ``c`` is nearer to a row ``x`` of the cluster around ``a`` only if ``|c - a| < 2 |x - a|`` (Elkan 2003,
    lemma 1). Rows are taken in an order that keeps each cluster, and clusters near each other, together.

    Args:
        rows: All rows, with their clusters.
        rank: Place of each centre in that order (K,), int64.
        vectors: Gives the centres of some numbers.
    """

    def __init__(self, rows: Rows, rank: torch.Tensor, vectors: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.lens = rows.lens
        self.vectors = vectors
        self.radius = torch.zeros(len(rank), device=rank.device)  # of the cluster at each place
        keys = torch.arange(len(rows.points), device=rank.device)
        for start in range(0, len(keys), 64 * rows.block):
            numbers = keys[start : start + 64 * rows.block]
            place = rank.index_select(0, rows.owner.index_select(0, numbers))
            self.radius.scatter_reduce_(0, place, rows.distances(numbers), "amax")
            numbers.add_(place << 32)
        if keys.device.type == "cpu":
            keys.numpy().sort()  # in place: torch's takes several times the memory
        else:
            keys = keys.sort().values
        self.first = (keys[:: rows.block] >> 32).tolist()
        self.last = [*(keys[rows.block - 1 :: rows.block] >> 32).tolist(), int(keys[-1] >> 32)][: len(self.first)]
        self.order = keys.bitwise_and_(2**32 - 1)
        self.centre_at = rank.argsort()
        self.kept = 0

    def within(self, block: int, centres: Centres) -> torch.Tensor:
        """Numbers of the new centres within reach of a block's rows."""
        lens = self.lens
        places = padded(torch.arange(self.first[block], self.last[block] + 1, device=self.order.device))
        rounded, squares, errors = lens.describe(self.vectors(self.centre_at.index_select(0, places)))
        far = (2 * self.radius.index_select(0, places) + errors + centres.error).square_()
        far += ((squares.sqrt() + centres.length).square_() + far) * lens.sums + lens.tiny
        ones = torch.ones((len(places), lens.tail), dtype=lens.dtype, device=places.device)
        left = torch.cat([rounded, lens.split(squares - far), ones], 1)
        # |c - a|^2 - far^2 is negative within reach; rounding the result keeps its sign.
        reached = torch.mm(left, centres.factor.T).view(lens.bits).amin(0)[: len(centres)] < 0
        numbers = reached.nonzero().squeeze(1)
        self.kept += len(numbers)
        return numbers


class Shards:
    """The processes that share the rows of one traversal; without a group, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.world = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every process's tensor of the same shape, concatenated in order of rank."""
        if self.world == 1:
            return values
        flat = values.contiguous().view(torch.uint8)  # any type, whatever the backend knows
        parts = [torch.empty_like(flat) for _ in range(self.world)]
        dist.all_gather(parts, flat, group=self.group)
        return torch.cat(parts).view(values.dtype)

    def merge(self, values: torch.Tensor) -> torch.Tensor:
        """Tensor of which each process has some values, and zeros in place of the others'."""
        if self.world > 1:
            dist.all_reduce(values.view(torch.uint8), group=self.group)  # sums of bytes, all but one of them zero
        return values

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """The first process's tensor; the others pass one of the same shape to write to."""
        if self.world > 1:
            dist.broadcast(values, group_src=0, group=self.group)
        return values


def rows_of_all(points: torch.Tensor, numbers: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Rows (K, D) of all processes' ``points``, numbered through them in order of rank; the same in every process."""
    if shards.world == 1:
        return points.index_select(0, numbers)
    counts = shards.gather(torch.tensor([len(points)], device=points.device))
    numbers = numbers - counts[: shards.rank].sum()
    rows = points.new_zeros((len(numbers), points.shape[1]))
    mine = ((numbers >= 0) & (numbers < len(points))).nonzero().squeeze(1)
    for part in mine.split(piece(points)):
        rows[part] = points.index_select(0, numbers.index_select(0, part))
    return shards.merge(rows)


class Traversal:
    """A farthest-first traversal over the rows of all processes.

    Each process holds its own rows. In a round, the farthest rows of all are gathered, the first process picks among
    them, and every process updates its rows with the picks: three collectives a round, none a pick.

    Args:
        points: This process's rows (N, D).
        random_state: Seed of the starting row.
        group: The processes; ``None`` for this one alone.
        seeds: Centres (S, D) to start from instead of a row; they are no picks.

    Attributes:
        picks: Numbers of the picked rows (K,), int64, in order; rows are numbered through all processes by rank.
        total: Rows of all processes.
    """

    def __init__(
        self,
        points: torch.Tensor,
        random_state: int | None,
        group: dist.ProcessGroup | None = None,
        seeds: torch.Tensor | None = None,
    ) -> None:
        self.shards = Shards(group)
        device = points.device
        counts = self.shards.gather(torch.tensor([len(points)], device=device)).tolist()
        self.total, self.offset = sum(counts), sum(counts[: self.shards.rank])
        seeds = points[:0] if seeds is None else seeds
        # rows may belong to a seed, which has no number: then there are no clusters to keep
        self.rows = Rows(points, _lens([points, seeds], self.shards), clusters=not len(seeds))
        # More candidates mean fewer, larger updates; picking among a small share of the rows costs little beside them.
        self.candidates = max(_MIN_CANDIDATES, min(_MAX_CANDIDATES, self.total // 32))
        # The product of a block with more of them would take much memory beside few rows.
        self.batch = max(_MIN_CANDIDATES, min(_MAX_BATCH, self.total // 200))
        self.picks = torch.empty(0, dtype=torch.int64, device=device)
        self._vectors: list[torch.Tensor] = []  # the centres, where other processes' rows are among them
        self._rank = self.picks
        self._prune_from = _PRUNE_FROM
        if len(seeds):
            for part in seeds.split(self.batch):
                self.rows.update(part)
        else:
            start, vector = self._start(random_state)
            self._add(start, vector, torch.zeros_like(start))

    def _start(self, random_state: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The row farthest along a random direction: random, but the same however the rows are shuffled."""
        points = self.rows.points
        generator = torch.Generator()
        if random_state is None:
            generator.seed()
        else:
            generator.manual_seed(int(random_state))
        direction = torch.randn(points.shape[1], dtype=torch.float64, generator=generator).to(points.device)
        slack = float(direction.abs().sum()) * (points.shape[1] + 16) * 2.0**-22
        number = torch.zeros(1, dtype=torch.int64, device=points.device)
        best = torch.full((1,), -math.inf, dtype=torch.float64, device=points.device)
        vector = points.new_zeros((1, points.shape[1]))
        for start in range(0, len(points), piece(points)):
            part = points[start : start + piece(points)]
            along = self.rows.lens.full(part) @ direction.float()
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
        """Largest squared distance of any row to its nearest centre."""
        mine = self.rows.nearest.max().view(1) if len(self.rows.nearest) else self.rows.nearest.new_zeros(1)
        return float(self.shards.gather(mine).max())

    def advance(self, wanted: int, floor: float) -> bool:
        """One round: pick as many rows as the candidates allow; False when no row is left above ``floor``.

        Args:
            wanted: Number of picks to stop at.
            floor: Squared distance at and below which no row is picked.
        """
        rows, world = self.rows, self.shards.world
        count = -(-self.candidates // world)
        mine, outside = candidates(rows.nearest, count) if len(rows.nearest) else (self.picks[:0], -1.0)
        facts = rows.nearest.new_full((count if world > 1 else len(mine), 4), -1)  # a shard may have fewer
        facts[: len(mine), 0] = rows.nearest.index_select(0, mine)
        facts[: len(mine), 1] = (mine + self.offset).double()  # whole numbers, exact below 2^53
        facts[: len(mine), 2] = 0 if rows.owner is None else rows.owner.index_select(0, mine).double()
        facts[:, 3] = outside
        points = rows.points.new_zeros((len(facts), rows.points.shape[1]))
        points[: len(mine)] = rows.points.index_select(0, mine)
        facts, points = self.shards.gather(facts), self.shards.gather(points)
        distances, outside = facts[:, 0].contiguous(), max(float(facts[:, 3].max()), floor)
        if float(distances.max()) <= floor:
            return False
        limit = min(wanted - len(self.picks), self.batch)
        batch = torch.full((limit + 1,), -1, dtype=torch.int64, device=points.device)
        if self.shards.rank == 0:
            few = Rows(points, rows.lens, distances).farthest(limit, outside)
            if not len(few):  # the candidates tie with a row outside them: one plain pick, the first of the farthest
                few = distances.argmax().view(1)
            batch[: len(few)] = few
        batch = self.shards.from_first(batch)
        batch = batch[batch >= 0]
        chosen = facts.index_select(0, batch)
        self._add(chosen[:, 1].long(), points.index_select(0, batch), chosen[:, 2].long())
        return True

    def _add(self, numbers: torch.Tensor, vectors: torch.Tensor, owners: torch.Tensor) -> None:
        """Add centres, each with the number of the centre that its row belonged to."""
        before = len(self.picks)
        reach = None
        if (
            self.rows.owner is not None
            and before >= self._prune_from
            and len(numbers) >= _PRUNE_BATCH
            and len(self.rows.points)
        ):
            reach = ClusterReach(self.rows, self._rank, self._centres)
        self.rows.update(vectors, before, reach)
        if reach is not None and reach.kept > 0.85 * len(reach.first) * len(numbers):
            self._prune_from = before + before // 2  # not worth its cost yet
        self.picks = torch.cat([self.picks, numbers])
        if self.shards.world > 1:
            self._vectors.append(vectors)
        # A new centre stands next to the one that its row belonged to: this keeps near clusters together.
        place = torch.cat(
            [self._rank.double(), self._rank.index_select(0, owners).double() + 0.5 if before else owners.double()]
        )
        self._rank = torch.empty_like(self.picks)
        self._rank[place.argsort(stable=True)] = torch.arange(len(self.picks), device=self.picks.device)

    def _centres(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.shards.world == 1:
            return self.rows.points.index_select(0, self.picks.index_select(0, numbers))
        if len(self._vectors) > 1:
            self._vectors = [torch.cat(self._vectors)]
        return self._vectors[0].index_select(0, numbers)


def _lens(matrices: list[torch.Tensor], shards: Shards) -> Lens:
    columns = matrices[0].shape[1]
    facts = matrices[0].new_zeros((1, columns + 2), dtype=torch.float64)  # sums of the columns, rows, largest magnitude
    for part in (part for matrix in matrices for part in matrix.split(piece(matrix)) if len(part)):
        wide = part if part.dtype == torch.float64 else part.float()
        facts[0, :columns] += wide.sum(0)
        facts[0, columns] += len(part)
        facts[0, -1] = torch.maximum(facts[0, -1], torch.stack(wide.aminmax()).abs().amax())
    facts = shards.gather(facts)
    mean = (facts[:, :columns].sum(0) / facts[:, columns].sum()).float()
    largest = float(facts[:, -1].max())
    longest = (largest + float(mean.abs().max())) * math.sqrt(columns)
    if not math.isfinite(largest):
        msg = "embeddings hold NaN or infinite values; farthest-first distances are not defined on them."
        raise ValueError(msg)
    if not longest <= torch.finfo(torch.float32).max / 4:
        msg = f"embeddings hold values up to {largest:.3g}, too large for distances; scale them down first."
        raise ValueError(msg)
    # Powers of two that a float32 can hold
    scale = 2.0 ** max(-120, min(120, -math.frexp(longest)[1])) if longest else 1.0
    return Lens(mean, scale, product_type(mean.device, columns, torch.get_num_threads()))
