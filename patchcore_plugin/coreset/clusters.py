"""Clusters of rows around their nearest centers, and which new centers can matter to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.rounding import Centers, Rounding, padded

if TYPE_CHECKING:
    from patchcore_plugin.coreset.tuning import Tuning

_BLOCKS_AT_ONCE = 64


class OrderedCenters(NamedTuple):
    """All centers so far, in an order that puts near ones together.

    Attributes:
        rank: Place of each center in the order (K,), int64.
        matrix: Matrix (L, D) with the centers among its rows.
        rows: Row of each center in ``matrix`` (K,), int64.
    """

    rank: torch.Tensor
    matrix: torch.Tensor
    rows: torch.Tensor


class ClusterReach:
    """Which new centers can lie nearer to some row of a block than the row's own center.

    A new center ``c`` is nearer to a row ``x`` of the cluster around ``a`` only if ``|c - a| < 2 |x - a|`` (Elkan 2003,
    lemma 1). Rows are taken in an order that keeps each cluster, and clusters near each other, together.

    Args:
        nearest: Squared distance of each row to its nearest center (N,), float64.
        owner: Number of that center (N,), int32.
        block: Rows of a block.
        centers: All centers so far.
        rounding: How rows enter products.
        tuning: Sizes of the parts of the work.

    Attributes:
        order: The rows' positions in the order in which blocks take them (N,), int64.
        compared: Pairs of a block and a new center within its reach, so far.
    """

    def __init__(
        self,
        nearest: torch.Tensor,
        owner: torch.Tensor,
        block: int,
        centers: OrderedCenters,
        rounding: Rounding,
        tuning: Tuning,
    ) -> None:
        self.rounding = rounding
        self.tuning = tuning
        self.centers = centers.matrix
        self.row_at = centers.rows.index_select(0, centers.rank.argsort())  # of the center at each place
        self.radius, keys = _radii_and_keys(nearest, owner, centers.rank, rounding, _BLOCKS_AT_ONCE * block)
        self.first = (keys[::block] >> 32).tolist()  # place of each block's first and last cluster
        self.last = [*(keys[block - 1 :: block] >> 32).tolist(), int(keys[-1] >> 32)][: len(self.first)]
        self.order = keys.bitwise_and_(2**32 - 1)
        self.compared = 0

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.first)

    def within(self, block: int, new: Centers) -> torch.Tensor:
        """Positions (b,), int64, of the new centers within reach of a block's rows."""
        rounding = self.rounding
        places = torch.arange(self.first[block], self.last[block] + 1, device=self.order.device)
        places = padded(places, self.tuning)
        rounded = rounding.round(self.centers.index_select(0, self.row_at.index_select(0, places)))
        far = (2 * self.radius.index_select(0, places) + rounded.errors + new.error).square_()
        far += ((rounded.squares.sqrt() + new.length).square_() + far) * rounding.sum_error + rounding.absolute_error
        ones = torch.ones((len(places), rounding.terms), dtype=rounding.dtype, device=places.device)
        left = torch.cat([rounded.values, rounding.split(rounded.squares - far), ones], 1)
        # |c - a|^2 - far^2 is negative within reach. Rounding the result keeps its sign.
        reached = torch.mm(left, new.factor.T).view(rounding.int_dtype).amin(0)[: len(new)] < 0
        positions = reached.nonzero().squeeze(1)
        self.compared += len(positions)
        return positions


def _radii_and_keys(
    nearest: torch.Tensor, owner: torch.Tensor, rank: torch.Tensor, rounding: Rounding, piece: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled radius of the cluster at each place (K,), and sorted keys (N,): a place (high bits) and a row's position."""
    radius = torch.zeros(len(rank), device=rank.device)
    keys = torch.arange(len(nearest), device=rank.device)
    for positions in keys.split(piece):  # views: the keys are changed in place
        place = rank.index_select(0, owner.index_select(0, positions))
        distances = rounding.scaled_distances(nearest.index_select(0, positions))
        radius.scatter_reduce_(0, place, distances, "amax")
        positions.add_(place << 32)
    if keys.device.type == "cpu":
        keys.numpy().sort()  # in place: torch's sort takes several times the memory
    else:
        keys = keys.sort().values
    return radius, keys
