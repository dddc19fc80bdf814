"""Greedy coreset: exact farthest-first traversal (greedy k-center) over patch embeddings.

Source: Roth et al., arXiv 2106.08265, section 3.2 and algorithm 1. The traversal is Gonzalez's (1985); its radius is at
most twice the smallest possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchcore_plugin.checks import check_number
from patchcore_plugin.coreset.processes import Shards, rows_of_all
from patchcore_plugin.coreset.products import full_float32
from patchcore_plugin.coreset.progress import CoresetProgress
from patchcore_plugin.coreset.threads import threads_for
from patchcore_plugin.coreset.traversal import Traversal, random_generator
from patchcore_plugin.coreset.tuning import Tuning
from patchcore_plugin.cpu import outside_fork
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    import torch.distributed as dist
    from numpy.typing import ArrayLike

DEFAULT_RATIO = 0.1

BOUNDS: dict[str, dict[str, Any]] = {
    "ratio": {
        "low": 0, "high": 1, "closed": "right",
        "hint": "0.1 keeps every tenth patch (the paper's 10 %), 0.01 every hundredth, 1 keeps them all.",
    },
    "size": {"low": 1, "whole": True},
    "radius": {
        "low": 0,
        "hint": "It is a distance between patch embeddings: train once with a coreset ratio, and start from the covering "
        "radius that the log reports.",
    },
    "random_state": {"low": 0, "high": 2**63 - 1, "whole": True},
    "projection": {
        "low": 0, "high": 1, "closed": "neither",
        "hint": "It is the relative error of squared distances that a random projection may make: 0.5 is coarse, 0.9 is "
        "what anomalib uses; leave it out to pick exactly.",
    },
}  # fmt: skip
"""Bounds of the sampler's arguments, for :func:`patchcore_plugin.checks.check_number`."""


@dataclass(eq=False)
class GreedyCoreset:
    """Select the patches of the memory bank by exact farthest-first traversal.

    Each pick is the embedding farthest (Euclidean) from all picks so far, the lowest index where several are equally far.
    Distances that decide are float64; low-precision products only rule out what cannot matter. So the picks are those of a
    float64 one-at-a-time search, hundreds of times sooner. :mod:`patchcore_plugin.coreset.traversal` says how.

    Picking stops at ``size`` (or ``ratio``) or at ``radius``, whichever comes first.

    Args:
        ratio: Share of the rows to keep, in (0, 1]; at least one row is kept. ``None`` is 0.1 where neither ``size`` nor
            ``radius`` is given, and no limit otherwise.
        size: Number of rows to keep, at least 1, instead of ``ratio``. More than there are rows keeps them all.
        radius: Stop as soon as every row lies within this distance of the coreset, in feature units, at least 0.
        random_state: Seed of the starting row, which is the farthest one along a random direction: the order of the rows
            does not matter. ``None`` draws a new direction at every fit.
        progress: Show a progress bar.
        projection: Largest relative error of squared distances, in (0, 1), that picking may make for speed. Rows are
            first projected at random to the dimension that keeps it (Johnson and Lindenstrauss 1984), where that is lower
            than their own. ``None`` picks by the rows as they are, which is exact.
        tuning: Sizes of the parts of the work, which change its speed and memory, never the picks. ``None`` takes those for
            the rows' device.

    Attributes:
        radius_: Covering radius after :meth:`fit`: the largest distance of any row to the coreset, in feature units; with
            a projection, an upper bound of it.

    Raises:
        UsageError: If ``ratio`` is outside (0, 1], ``size`` below 1, ``radius`` negative or not finite, ``projection``
            outside (0, 1), or if arguments are given that exclude each other.

    Example:
        >>> indices = GreedyCoreset(ratio=0.1).fit(embeddings)
        >>> bank = embeddings[indices]
    """

    ratio: float | None = None
    size: int | None = None
    radius: float | None = None
    random_state: int | None = 0
    progress: bool = True
    projection: float | None = None
    tuning: Tuning | None = None
    radius_: float = field(default=math.nan, init=False)

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            check_number(name, getattr(self, name), optional=True, **bounds)
        if self.ratio is not None and self.size is not None:
            msg = f"ratio ({self.ratio!r}) and size ({self.size!r}) both set the number of rows: give one of them."
            raise UsageError(msg)
        if self.projection is not None and self.radius is not None:
            msg = (
                f"radius ({self.radius!r}) is a distance of the rows themselves: leave projection ({self.projection!r}) out."
            )
            raise UsageError(msg)
        if self.ratio is None and self.size is None and self.radius is None:
            self.ratio = DEFAULT_RATIO

    def fit(self, embeddings: torch.Tensor | ArrayLike, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Pick the coreset.

        Args:
            embeddings: Patch embeddings (N, D), float16, bfloat16, float32 or float64, on any device, or an array.
            group: Processes (``torch.distributed``) that share the work: each passes its own rows, any number of them,
                and gets the coreset of all. Rows are numbered through all processes in order of rank, and the picks are
                those of one process that holds them all.

        Returns:
            Indices of the picked rows (K,), int64, in the order of picking, on the device of ``embeddings``. Fewer than
            asked for where the rows hold fewer distinct vectors: a duplicate adds nothing to a memory bank.

        Raises:
            UsageError: If ``embeddings`` is not a matrix with at least one row and column, or holds NaN or infinity.
        """
        return outside_fork(self._fit, embeddings, group)

    def _fit(self, embeddings: torch.Tensor | ArrayLike, group: dist.ProcessGroup | None) -> torch.Tensor:
        points = _as_matrix(embeddings, shared=group is not None)
        home = points.device
        if home.type not in {"cpu", "cuda"}:
            points = points.cpu()  # Apple's and some of Intel's GPUs have no float64
        with torch.inference_mode(), full_float32(points.device.type), threads_for(points):
            picks = self._pick(points, group).to(home)
        return picks.clone()  # usable in a computation that records gradients

    def count(self, rows: int) -> int:
        """Number of rows to keep of ``rows``; ``rows`` where only ``radius`` limits it."""
        if self.size is not None:
            return min(rows, self.size)
        return rows if self.ratio is None else max(1, int(rows * self.ratio))

    def tuning_on(self, device: torch.device) -> Tuning:
        """Sizes of the parts of the work on a device."""
        return self.tuning or Tuning.of(device)

    def _pick(self, points: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        radius = float(self.radius or 0)
        seen = points if self.projection is None else project(points, self.projection, self.random_state, group)
        traversal = Traversal(seen, self.random_state, self.tuning_on(points.device), group)
        wanted = self.count(traversal.total)
        known = self.ratio is not None or self.size is not None
        with CoresetProgress(wanted, known=known, enabled=self.progress and traversal.shards.rank == 0) as progress:
            while len(traversal.picks) < wanted and traversal.advance(wanted, radius * radius):
                progress.update(len(traversal.picks))
        self.radius_ = math.sqrt(traversal.farthest) if seen is points else _radius_around(points, traversal)
        return traversal.picks


def project(
    points: torch.Tensor, distortion: float, random_state: int | None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Project rows at random to fewer values.

    Source: Li, Hastie and Church, "Very sparse random projections", 2006; dimension by Dasgupta and Gupta, 2003.

    Args:
        points: The rows (N, D).
        distortion: Largest relative error of squared distances, with high probability.
        random_state: Seed of the projection; ``None`` draws a new one.
        group: Processes that hold more of the rows.

    Returns:
        Matrix (N, d), float32; ``points`` itself where the projection would not lower the dimension.
    """
    shards = Shards(group)
    total = int(shards.gather(torch.tensor([len(points)], device=points.device)).sum())
    columns = points.shape[1]
    dimension = math.ceil(4 * math.log(max(total, 2)) / (distortion**2 / 2 - distortion**3 / 3))
    if dimension >= columns:
        return points
    density = 1 / math.sqrt(columns)
    drawn = torch.rand((columns, dimension), generator=random_generator(random_state))
    signs = torch.where(drawn < density / 2, -1.0, torch.where(drawn < density, 1.0, 0.0))
    directions = shards.from_first((signs / math.sqrt(density * dimension)).to(points.device))
    projected = torch.empty((len(points), dimension), device=points.device)
    for start in range(0, len(points), 2048):
        torch.mm(points[start : start + 2048].float(), directions, out=projected[start : start + 2048])
    return projected


def _radius_around(points: torch.Tensor, traversal: Traversal) -> float:
    """Largest distance of any row to the pick that is nearest by its projection: no row is farther from the coreset."""
    shards, owner = traversal.shards, traversal.rows.owner
    centers = rows_of_all(points, traversal.picks, shards, traversal.tuning)
    squared = torch.zeros(1, dtype=torch.float64, device=points.device)
    piece = traversal.tuning.rows_of_piece(points.shape[1])
    for start in range(0, len(points), piece):
        part = slice(start, start + piece)
        nearest = centers.index_select(0, owner[part]).double()
        squared = torch.maximum(squared, (nearest - points[part]).square_().sum(1).max())
    return math.sqrt(float(shards.gather(squared).max()))


def _as_matrix(embeddings: torch.Tensor | ArrayLike, *, shared: bool) -> torch.Tensor:
    """Embeddings as a matrix of floating-point numbers; ``shared`` allows a process without rows."""
    if isinstance(embeddings, np.ndarray):
        embeddings = np.ascontiguousarray(embeddings)  # torch takes no negative strides
    points = torch.as_tensor(embeddings).detach()
    if points.is_complex():
        msg = f"embeddings must be real numbers, got {points.dtype}."
        raise UsageError(msg)
    if points.ndim != 2 or points.shape[1] == 0 or (len(points) == 0 and not shared):
        msg = f"embeddings must be a matrix (N, D) with at least one row and one column, got shape {tuple(points.shape)}."
        raise UsageError(msg)
    return points if points.is_floating_point() else points.double()
