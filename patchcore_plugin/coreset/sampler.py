"""Greedy coreset: exact farthest-first traversal (greedy k-center) over patch embeddings.

Source: Roth et al., arXiv 2106.08265, section 3.2 and algorithm 1. The traversal is Gonzalez's (1985); its radius is at
most twice the smallest possible.
"""

from __future__ import annotations

import math
import time
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from patchcore_plugin.coreset.distances import full_float32, piece
from patchcore_plugin.coreset.traversal import Shards, Traversal, rows_of_all

if TYPE_CHECKING:
    import torch.distributed as dist
    from numpy.typing import ArrayLike

DEFAULT_RATIO = 0.1


class GreedyCoreset:
    """Select the patches of the memory bank by exact farthest-first traversal.

    Each pick is the embedding farthest (Euclidean) from all picks so far, the lowest index where several are equally
    far. Distances that decide are float64; low-precision products only rule out what cannot matter, so the picks are
    those of a float64 one-at-a-time search, hundreds of times sooner. :mod:`patchcore_plugin.coreset.traversal` says how.

    Picking stops at ``size`` (or ``ratio``) or at ``radius``, whichever comes first.

    Args:
        ratio: Share of the rows to keep, in (0, 1]; at least one row is kept. ``None`` is 0.1 where neither ``size`` nor
            ``radius`` is given, and no limit otherwise.
        size: Number of rows to keep, at least 1, instead of ``ratio``. More than there are rows keeps them all.
        radius: Stop as soon as every row lies within this distance of the coreset, in feature units, at least 0.
        random_state: Seed of the starting row, which is the farthest one along a random direction: the order of the rows
            does not matter. ``None`` draws a new direction at every fit.
        progress: Show a progress bar.
        projection: Largest relative error of squared distances, in (0, 1), that picking may make for speed: rows are
            first projected at random to the dimension that keeps it (Johnson and Lindenstrauss 1984), where that is lower
            than their own. ``None`` picks by the rows as they are, which is exact.

    Attributes:
        radius_: Covering radius after :meth:`fit`: the largest distance of any row to the coreset, in feature units; with
            a projection, an upper bound of it.

    Raises:
        ValueError: If ``ratio`` is outside (0, 1], ``size`` below 1, ``radius`` negative or not finite, ``projection``
            outside (0, 1), or if arguments are given that exclude each other.

    Example:
        >>> indices = GreedyCoreset(ratio=0.1).fit(embeddings)
        >>> bank = embeddings[indices]
    """

    def __init__(
        self,
        ratio: float | None = None,
        size: int | None = None,
        radius: float | None = None,
        random_state: int | None = 0,
        progress: bool = True,
        projection: float | None = None,
    ) -> None:
        if ratio is not None:
            check_ratio(ratio)
        if size is not None:
            check_count("size", size)
        if ratio is not None and size is not None:
            msg = f"ratio ({ratio!r}) and size ({size!r}) both set the number of rows: give one of them."
            raise ValueError(msg)
        if radius is not None:
            check_radius("radius", radius)
        check_random_state(random_state)
        if projection is not None:
            check_projection("projection", projection)
            if radius is not None:
                msg = f"radius ({radius!r}) is a distance of the rows as they are: leave projection ({projection!r}) out."
                raise ValueError(msg)
        self.ratio = DEFAULT_RATIO if ratio is None and size is None and radius is None else ratio
        self.size = size
        self.radius = radius
        self.random_state = random_state
        self.progress = progress
        self.projection = projection
        self.radius_: float = math.nan

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
            ValueError: If ``embeddings`` is not a matrix with at least one row and column, or holds NaN or infinity.
        """
        points = _as_matrix(embeddings, shared=group is not None)
        home = points.device
        if home.type not in {"cpu", "cuda"}:
            points = points.cpu()  # Apple's and some of Intel's GPUs have no float64
        with torch.inference_mode(), full_float32(points.device.type):
            picks = self._pick(points, group).to(home)
        return picks.clone()  # usable in a computation that records gradients

    def sample(self, embeddings: torch.Tensor | ArrayLike, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Pick the coreset and return its rows (K, D), in every process of a group; otherwise like :meth:`fit`."""
        points = _as_matrix(embeddings, shared=group is not None)
        return rows_of_all(points, self.fit(points, group), Shards(group))

    def count(self, rows: int) -> int:
        """Number of rows to keep of ``rows``; ``rows`` where only ``radius`` limits it."""
        if self.size is not None:
            return min(rows, self.size)
        return rows if self.ratio is None else max(1, int(rows * self.ratio))

    def _pick(self, points: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        radius = float(self.radius or 0)
        seen = points if self.projection is None else project(points, self.projection, self.random_state, group)
        traversal = Traversal(seen, self.random_state, group)
        wanted = self.count(traversal.total)
        enabled = self.progress and traversal.shards.rank == 0
        with _Bar(wanted, known=self.ratio is not None or self.size is not None, enabled=enabled) as bar:
            while len(traversal.picks) < wanted and traversal.advance(wanted, radius * radius):
                bar.update(len(traversal.picks))
        if seen is points:
            self.radius_ = math.sqrt(traversal.farthest)
        else:
            self.radius_ = _radius_around(points, traversal)
        return traversal.picks


class _Bar:
    """Progress by picks, with the time left from what rounds of picks cost: a part for the round, a part for each pick."""

    def __init__(self, wanted: int, *, known: bool, enabled: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[left]}"), disable=not enabled)
        self.wanted = wanted
        self.task = self.bar.add_task("Coreset", total=wanted if known else None, completed=1, left="")
        self.rounds: list[tuple[int, float]] = []
        self.done, self.at = 1, time.perf_counter()
        self.known = known

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.update(self.task, total=self.done, completed=self.done, left="")
        self.bar.stop()

    def update(self, done: int) -> None:
        now = time.perf_counter()
        self.rounds.append((done - self.done, now - self.at))
        self.done, self.at = done, now
        left = seconds_left(self.rounds, self.wanted - done) if self.known else None
        text = "" if left is None else f"about {int(left) // 60}:{int(left) % 60:02d} left"
        self.bar.update(self.task, completed=done, left=text)


def seconds_left(rounds: list[tuple[int, float]], picks: int) -> float | None:
    """Time for ``picks`` more picks, from the picks and seconds of past rounds; ``None`` where too little is known.

    Early rounds pick few rows and cost almost as much as later ones: time per pick falls steeply at first, so a line is
    put through the rounds' costs instead, and further rounds are taken to be as large as the last.
    """
    sizes, seconds = np.array(rounds, dtype=float).T
    if len(rounds) < 4 or sizes.sum() * 20 < picks:
        return None
    recent = slice(-8, None)
    each, base = np.polyfit(sizes[recent], seconds[recent], 1) if np.ptp(sizes[recent]) else (0.0, seconds[recent].mean())
    if each < 0 or base < 0:  # rounds differ for other reasons: take the plain average
        each, base = seconds[recent].sum() / sizes[recent].sum(), 0.0
    return float(each * picks + base * math.ceil(picks / sizes[-1]))


def project(
    points: torch.Tensor, distortion: float, random_state: int | None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Rows (N, D) as seen by a sparse random projection, or as they are where that would not lower their dimension.

    Source: Li, Hastie and Church, "Very sparse random projections", 2006; dimension by Dasgupta and Gupta, 2003.

    Args:
        points: The rows.
        distortion: Largest relative error of squared distances, with high probability.
        random_state: Seed of the projection; ``None`` draws a new one.
        group: Processes that hold more of the rows.

    Returns:
        Matrix (N, d), float32.
    """
    shards = Shards(group)
    total = int(shards.gather(torch.tensor([len(points)], device=points.device)).sum())
    columns = points.shape[1]
    dimension = math.ceil(4 * math.log(max(total, 2)) / (distortion**2 / 2 - distortion**3 / 3))
    if dimension >= columns:
        return points
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    else:
        generator.manual_seed(int(random_state))
    density = 1 / math.sqrt(columns)
    drawn = torch.rand((columns, dimension), generator=generator)
    directions = torch.where(drawn < density / 2, -1.0, torch.where(drawn < density, 1.0, 0.0)) / math.sqrt(
        density * dimension
    )
    directions = shards.from_first(directions.to(points.device))
    projected = torch.empty((len(points), dimension), device=points.device)
    for start in range(0, len(points), 2048):
        torch.mm(points[start : start + 2048].float(), directions, out=projected[start : start + 2048])
    return projected


def _radius_around(points: torch.Tensor, traversal: Traversal) -> float:
    """Largest distance of any row to the pick that is nearest by its projection: no row is farther from the coreset."""
    shards, owner = traversal.shards, traversal.rows.owner
    centres = rows_of_all(points, traversal.picks, shards)
    squared = torch.zeros(1, dtype=torch.float64, device=points.device)
    for start in range(0, len(points), piece(points)):
        part = slice(start, start + piece(points))
        nearest = centres.index_select(0, owner[part]).double()
        squared = torch.maximum(squared, (nearest - points[part]).square_().sum(1).max())
    return math.sqrt(float(shards.gather(squared).max()))


def check_ratio(ratio: Any) -> None:
    """Raise a ValueError unless ``ratio`` is a number in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
        msg = (
            f"coreset_sampling_ratio must be a number in (0, 1], got {ratio!r}. "
            "0.1 keeps every tenth patch (the paper's 10 %), 0.01 every hundredth, 1 keeps them all."
        )
        raise ValueError(msg)


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        msg = f"{name} must be a whole number of at least 1, got {value!r}."
        raise ValueError(msg)


def check_radius(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a finite distance of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        msg = (
            f"{name} must be a finite number of at least 0, got {value!r}. It is a distance between patch embeddings: "
            "train once with a coreset ratio, and take the covering radius that the log reports as a start."
        )
        raise ValueError(msg)


def check_projection(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        msg = (
            f"{name} must be a number between 0 and 1, got {value!r}. It is the relative error of squared distances that a "
            "random projection may make: 0.5 is coarse, 0.9 is what anomalib uses; leave it out to pick exactly."
        )
        raise ValueError(msg)


def check_random_state(value: Any) -> None:
    """Raise a ValueError unless ``value`` is None or a whole number that torch takes as a seed."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < 2**63):
        msg = f"random_state must be None or a whole number from 0 on, got {value!r}."
        raise ValueError(msg)


def _as_matrix(embeddings: torch.Tensor | ArrayLike, *, shared: bool) -> torch.Tensor:
    if isinstance(embeddings, np.ndarray):
        embeddings = np.ascontiguousarray(embeddings)  # torch takes no negative strides
    points = torch.as_tensor(embeddings).detach()
    if points.is_complex():
        msg = f"embeddings must be real numbers, got {points.dtype}."
        raise ValueError(msg)
    if points.ndim != 2 or points.shape[1] == 0 or (len(points) == 0 and not shared):
        msg = f"embeddings must be a matrix (N, D) with at least one row and one column, got shape {tuple(points.shape)}."
        raise ValueError(msg)
    if not points.is_floating_point():
        points = points.double()
    return points
