"""Exact distances to the nearest center, kept up to date by low-precision products.

An update is one matrix product in low precision (bfloat16 where the processor multiplies it faster). Together with a bound
of its error, the product rules out the pairs of row and center that cannot matter; float64 differences decide the rest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.rounding import Centers, padded

if TYPE_CHECKING:
    from patchcore_plugin.coreset.clusters import ClusterReach
    from patchcore_plugin.coreset.rounding import Rounding
    from patchcore_plugin.coreset.tuning import Tuning


class _Block(NamedTuple):
    """Rows of one product.

    Attributes:
        rows: The rows (M, D).
        positions: Their positions among all rows (M,), int64.
        squares: Their squared lengths, as numbers that add up to them (M, terms).
        near: Positions of the new centers to compare them with (B,), int64; ``None`` for all new centers.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    squares: torch.Tensor
    near: torch.Tensor | None


class Rows:
    """Rows (N, D) with their exact squared distances to the nearest center.

    Args:
        points: The rows, of any floating type.
        rounding: How rows enter products.
        tuning: Sizes of the parts of the work.
        nearest: Squared distances so far (N,), float64. ``None`` for no center yet.
        clusters: Also keep the number of each row's nearest center, in ``owner``.

    Attributes:
        block: Rows of a block.
        nearest: Squared distances to the nearest center (N,), float64.
        owner: Numbers of the nearest centers (N,), int32; ``None`` where they are not kept.
    """

    def __init__(
        self,
        points: torch.Tensor,
        rounding: Rounding,
        tuning: Tuning,
        nearest: torch.Tensor | None = None,
        *,
        clusters: bool = False,
    ) -> None:
        self.points = points
        self.rounding = rounding
        self.tuning = tuning
        self.block = tuning.rows_of_block(*points.shape)
        device = points.device
        if nearest is None:
            nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=device)
        self.nearest = nearest
        self.owner = torch.zeros(len(points), dtype=torch.int32, device=device) if clusters else None
        self._squares = torch.empty((len(points), rounding.terms), dtype=rounding.dtype, device=device)
        self._errors = torch.empty(len(points), device=device)
        piece = tuning.rows_of_piece(points.shape[1])
        for start in range(0, len(points), piece):
            part = slice(start, start + piece)
            _, squares, self._errors[part] = rounding.round(points[part])
            self._squares[part] = rounding.split(squares)

    def update(self, vectors: torch.Tensor, first: int = 0, reach: ClusterReach | None = None) -> None:
        """Lower the distances by new centers.

        Args:
            vectors: The new centers (B, D), of the rows' type.
            first: Number of the first new center.
            reach: Which new centers to compare with which rows; ``None`` compares all with all.
        """
        centers = Centers(vectors, self.rounding, self.tuning, first)
        buffers = _Buffers(self, centers, gathers=reach is not None)
        for start in range(0, len(self.points), self.block):
            block = self._all_with_all(start) if reach is None else self._within_reach(start, reach, centers, buffers)
            if block is not None:
                product = buffers.product(block, centers)
                self._lower(block, *self._near_pairs(product, block, centers), centers)

    def _all_with_all(self, start: int) -> _Block:
        positions = torch.arange(start, min(start + self.block, len(self.points)), device=self.points.device)
        part = slice(start, start + self.block)
        return _Block(self.points[part], positions, self._squares[part], None)

    def _within_reach(self, start: int, reach: ClusterReach, centers: Centers, buffers: _Buffers) -> _Block | None:
        near = reach.within(start // self.block, centers)
        if not len(near):
            return None
        positions = reach.order[start : start + self.block]
        rows = torch.index_select(self.points, 0, positions, out=buffers.gathered[: len(positions)])
        return _Block(rows, positions, self._squares.index_select(0, positions), near)

    def _near_pairs(self, product: torch.Tensor, block: _Block, centers: Centers) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of row and column that may bring the row a smaller distance, and the smallest of all.

        Args:
            product: Squared distances (M, B), with all errors of low precision.
            block: The rows.
            centers: The new centers.

        Returns:
            Positions in the block and columns of the product (P,), int64.
        """
        rounding, segment_columns = self.rounding, self.tuning.segment_columns
        # how far rounding moved row and center together, and the error of the product's sums
        moved = self._errors.index_select(0, block.positions) + centers.error
        sums = (block.squares[:, 0].float().sqrt() * 1.01 + centers.length).square_() * rounding.sum_error
        sums += rounding.absolute_error
        keys = product.view(rounding.int_dtype).view(len(product), -1, segment_columns)
        lowest_keys = keys.amin(2)
        lowest = lowest_keys.amin(1).view(rounding.dtype).float().clamp_(min=0)
        nearest = rounding.scaled_distances(self.nearest.index_select(0, block.positions))
        limit = ((nearest + moved).square_() + sums) * (1 + rounding.result_error)
        near = (lowest <= limit).nonzero().squeeze(1)
        sums, moved, lowest = sums.index_select(0, near), moved.index_select(0, near), lowest.index_select(0, near)
        best = (lowest * (1 + 2 * rounding.result_error) + sums).sqrt_() + 2 * moved
        limit = torch.minimum(limit.index_select(0, near), (best.square_() + sums) * (1 + rounding.result_error))
        limit = rounding.round_up(limit)[:, None]
        # first the segments of columns that hold such a pair, then the pairs
        which, segment = (lowest_keys.index_select(0, near) <= limit).nonzero().unbind(1)
        row = near.index_select(0, which)
        columns = keys.view(-1, segment_columns).index_select(0, row * keys.shape[1] + segment)
        pair, column = (columns <= limit.index_select(0, which)).nonzero().unbind(1)
        return row.index_select(0, pair), column + segment.index_select(0, pair) * segment_columns

    def _lower(self, block: _Block, row: torch.Tensor, column: torch.Tensor, centers: Centers) -> None:
        """Lower distances by pairs of a block's row and a product's column."""
        real = column < (len(centers) if block.near is None else len(block.near))  # others repeat the last center
        row, column = row[real], column[real]
        if block.near is not None:
            column = block.near.index_select(0, column)
        piece = self.tuning.rows_of_piece(self.points.shape[1])
        for r, c in zip(row.split(piece), column.split(piece), strict=True):
            distance = centers.exact.index_select(0, c).sub_(block.rows.index_select(0, r)).square_().sum(1)
            position = block.positions.index_select(0, r)
            self.nearest.scatter_reduce_(0, position, distance, "amin")
            if self.owner is not None:
                nearer = distance == self.nearest.index_select(0, position)
                self.owner[position[nearer]] = (c[nearer] + centers.first).int()

    def farthest(self, limit: int, floor: float) -> torch.Tensor:
        """Pick up to ``limit`` rows farthest first, as long as their squared distance is above ``floor``.

        Distances are brought up to date only as far as picking needs it.

        Returns:
            Positions (K,), int64.
        """
        leaf = self.tuning.rows_of_leaf(self.points.shape[1])
        if len(self.points) <= leaf:
            return self._farthest_of_leaf(limit, floor)
        picks = torch.empty(0, dtype=torch.int64, device=self.points.device)
        while True:
            rows, outside = candidates(self.nearest, leaf)
            values = self.nearest.index_select(0, rows)
            best = float(values.max())
            if best <= floor:
                return picks
            few = Rows(self.points.index_select(0, rows), self.rounding, self.tuning, values)
            batch = few.farthest(limit - len(picks), max(outside, floor)) if best > outside else rows[:0]
            if not len(batch):
                batch = values.argmax().view(1)
            batch = rows.index_select(0, batch)
            picks = torch.cat([picks, batch])
            if len(picks) >= limit:
                return picks
            self.update(self.points.index_select(0, batch))

    def _farthest_of_leaf(self, limit: int, floor: float) -> torch.Tensor:
        points, nearest = self.points.double(), self.nearest.clone()
        picks: list[int] = []
        while len(picks) < limit:
            best, values = [], []
            for _ in range(min(self.tuning.leaf_steps, limit - len(picks))):
                best.append(nearest.argmax().view(1))
                values.append(nearest.index_select(0, best[-1]))
                torch.minimum(nearest, (points - points.index_select(0, best[-1])).square_().sum(1), out=nearest)
            good = sum(value > floor for value in torch.cat(values).tolist())  # values never rise
            picks += torch.cat(best).tolist()[:good]
            if good < len(best):
                break
        return torch.tensor(picks, dtype=torch.int64, device=points.device)


class _Buffers:
    """Memory that all products of one update share.

    Attributes:
        gathered: Room for a block's rows (block, D), where blocks are not slices of the rows.
    """

    def __init__(self, rows: Rows, centers: Centers, *, gathers: bool) -> None:
        block, width = rows.block, rows.points.shape[1]
        dtype, device = rows.rounding.dtype, rows.points.device
        self.rounding, self.tuning = rows.rounding, rows.tuning
        self.gathered = torch.empty((block if gathers else 0, width), dtype=rows.points.dtype, device=device)
        self._scaled = torch.empty((block, width), device=device)
        self._left = torch.ones((block, centers.factor.shape[1]), dtype=dtype, device=device)
        self._product = torch.empty(block * len(centers.factor), dtype=dtype, device=device)

    def product(self, block: _Block, centers: Centers) -> torch.Tensor:
        """Squared distances of a block's rows to new centers (M, B), in low precision; the last columns repeat a center."""
        size, width = block.rows.shape
        factor = centers.factor
        if block.near is not None:
            factor = factor.index_select(0, padded(block.near, self.tuning))
        left = self._left
        left[:size, :width] = self.rounding.scaled(block.rows, out=self._scaled[:size])
        left[:size, width : width + self.rounding.terms] = block.squares
        # whole blocks, whatever their last rows hold: kernels are compiled for one shape fewer
        return torch.mm(left, factor.T, out=self._product[: len(left) * len(factor)].view(len(left), -1))[:size]


def candidates(nearest: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """The ``count`` farthest rows in order of their position, and the largest squared distance outside them.

    The first of all farthest rows is among them, also where many are equally far. -1 stands for nothing outside.
    """
    values, rows = torch.topk(nearest, min(count + 1, len(nearest)))
    outside = float(values[count]) if len(values) > count else -1.0
    rows = rows[:count]
    first = nearest.argmax().view(1)
    if not bool((rows == first).any()):
        rows[-1:] = first
    return rows.sort().values, outside
