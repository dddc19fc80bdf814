"""Greedy coreset: exact farthest-first traversal (greedy k-center) over patch embeddings.

Source: Roth et al., arXiv 2106.08265, section 3.2 and algorithm 1. The traversal is Gonzalez's (1985); its radius is at
most twice the smallest possible.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

# Rows of one distance product: small enough that the product of a batch of centres stays in cache.
_BLOCK_ROWS = 8192
_MIN_CANDIDATES = 128
_MAX_CANDIDATES = 4096
_MAX_BATCH = 512


class GreedyCoreset:
    """Select the patches of the memory bank by exact farthest-first traversal.

    Each pick is the embedding farthest (Euclidean) from all picks so far, the lowest index where several are equally
    far. Distances that decide are float64; float32 products only rule out what cannot matter, so the picks are those of
    a float64 one-at-a-time search, tens of times sooner.

    How: every row knows its distance to the nearest centre. These only shrink as centres are added, so they are upper
    bounds between two updates. The farthest rows become candidates, and picking goes on among them alone for as long
    as the best candidate still lies farther than the largest bound outside. Then one matrix product brings all rows up
    to date with the whole batch of new centres.

    Args:
        ratio: Share of the rows to keep, in (0, 1]; at least one row is kept. Ignored when ``size`` is given.
        size: Number of rows to keep, at least 1. More than there are rows keeps them all.
        random_state: Seed of the starting row, which is the farthest one along a random direction: the order of the rows
            does not matter. ``None`` draws a new direction at every fit.
        progress: Show a progress bar.

    Attributes:
        radius_: Covering radius after :meth:`fit`: the largest distance of any row to the coreset, in feature units.

    Raises:
        ValueError: If ``ratio`` is outside (0, 1] or ``size`` is below 1.

    Example:
        >>> indices = GreedyCoreset(ratio=0.1).fit(embeddings)
        >>> bank = embeddings[indices]
    """

    def __init__(
        self,
        ratio: float = 0.1,
        size: int | None = None,
        random_state: int | None = 0,
        progress: bool = True,
    ) -> None:
        check_ratio(ratio)
        if size is not None:
            check_count("size", size)
        check_random_state(random_state)
        self.ratio = ratio
        self.size = size
        self.random_state = random_state
        self.progress = progress
        self.radius_: float = math.nan

    def fit(self, embeddings: torch.Tensor | ArrayLike) -> torch.Tensor:
        """Pick the coreset.

        Args:
            embeddings: Patch embeddings (N, D), float16, bfloat16, float32 or float64, on any device, or an array.

        Returns:
            Indices of the picked rows (K,), int64, in the order of picking, on the device of ``embeddings``. Fewer than
            asked for where the rows hold fewer distinct vectors: a duplicate adds nothing to a memory bank.

        Raises:
            ValueError: If ``embeddings`` is not a matrix with at least one row and column, or holds NaN or infinity.
        """
        points = _as_matrix(embeddings)
        home = points.device
        if home.type == "mps":
            points = points.cpu()  # Apple's GPUs have no float64
        wanted = min(len(points), self.size or max(1, int(len(points) * self.ratio)))
        with _progress_bar(enabled=self.progress) as bar, torch.inference_mode(), _full_float32(points.device.type):
            task = bar.add_task("Coreset", total=wanted)
            state = _Traversal(points, self.random_state)
            bar.update(task, completed=1)
            while len(state.picks) < wanted and state.advance(wanted):
                bar.update(task, completed=len(state.picks))
            bar.update(task, total=len(state.picks), completed=len(state.picks))
        self.radius_ = math.sqrt(float(state.nearest.max()))
        return torch.tensor(state.picks, dtype=torch.int64, device=home)


class _Traversal:
    """One farthest-first traversal: the picks so far, and every row's exact squared distance to the nearest of them."""

    def __init__(self, points: torch.Tensor, random_state: int | None) -> None:
        self.points = points
        # Centring changes no distance and makes the float32 expansion |x|^2 - 2xc + |c|^2 lose fewer digits.
        self.mean = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
        for rows in self._blocks():
            self.mean += points[rows].double().sum(0)
        self.mean = (self.mean / len(points)).float()
        self.norms = torch.empty(len(points), dtype=torch.float32, device=points.device)
        for rows in self._blocks():
            self.norms[rows] = self._centred(self.points[rows]).square().sum(1)
        if not bool(self.norms.isfinite().all()):
            msg = "embeddings hold values too large for float32 distances; scale them down first."
            raise ValueError(msg)
        # Rounding of a float32 dot product of D terms, with room for the three terms of the expansion and the centring.
        self.epsilon = (points.shape[1] + 8) * 2.0**-24 * 4
        self.underflow = (points.shape[1] + 8) * 2.0**-149 * 4  # what squares of tiny values lose
        self.nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=points.device)
        self.picks = [self._start(random_state)]
        self.candidates = _MIN_CANDIDATES
        self._update(self.picks)

    def _start(self, random_state: int | None) -> int:
        """The row farthest along a random direction: random, but the same however the rows are shuffled."""
        generator = torch.Generator()
        if random_state is None:
            generator.seed()
        else:
            generator.manual_seed(int(random_state))
        direction = torch.randn(self.points.shape[1], dtype=torch.float64, generator=generator).to(self.points.device)
        return int(torch.cat([self.points[rows].double() @ direction for rows in self._blocks()]).argmax())

    def advance(self, wanted: int) -> bool:
        """Pick as many rows as the candidates allow, then update all distances; False when nothing is left to pick."""
        count = min(self.candidates, len(self.points))
        values, rows = torch.topk(self.nearest, min(count + 1, len(self.points)))
        if values[0] == 0:
            return False
        # Nothing outside the candidates lies farther than this; with all rows as candidates, nothing lies outside.
        outside = float(values[count]) if len(values) > count else -1.0
        rows = rows[:count].sort().values  # argmax takes the first of equals: the lowest index, as a plain search does
        vectors = self.points[rows].double()
        nearest = self.nearest[rows].clone()
        batch: list[int] = []
        while len(batch) < _MAX_BATCH and len(self.picks) + len(batch) < wanted:
            best = int(nearest.argmax())
            value = float(nearest[best])
            if value <= outside or value == 0:
                break
            batch.append(int(rows[best]))
            torch.minimum(nearest, (vectors - vectors[best]).square_().sum(1), out=nearest)
        if not batch:  # the candidates tie with a row outside them: one plain pick, the lowest index of the farthest
            batch = [int(self.nearest.argmax())]
        self._adapt(len(batch))
        self._update(batch)
        self.picks += batch
        return True

    def _adapt(self, picked: int) -> None:
        """Keep the candidates' work per pick and the picks per update in balance."""
        if picked < self.candidates // 16:
            self.candidates = min(self.candidates * 2, _MAX_CANDIDATES)
        elif picked > self.candidates // 4:
            self.candidates = max(self.candidates // 2, _MIN_CANDIDATES)

    def _update(self, batch: list[int]) -> None:
        """Lower every row's distance to the nearest centre by the centres of one batch."""
        index = torch.tensor(batch, device=self.points.device)
        exact = self.points[index].double()
        centres = self._centred(self.points[index])
        norms = self.norms[index]
        largest = float(norms.max())
        for rows in self._blocks():
            # float32 filter: which (row, centre) pairs may lie nearer than the row's centre so far
            product = torch.addmm(norms, self._centred(self.points[rows]), centres.T, alpha=-2)
            lowest = product.amin(1) + self.norms[rows]
            slack = self.epsilon * (self.norms[rows] + largest) + self.underflow
            limit = self.nearest[rows]
            near = torch.nonzero(lowest.double() < limit + slack).squeeze(1)
            if not len(near):
                continue
            bound = torch.minimum(lowest[near] + 2 * slack[near], (limit[near] + slack[near]).float() * (1 + 2.0**-20))
            which, centre = torch.nonzero(product[near] + self.norms[rows][near, None] <= bound[:, None], as_tuple=True)
            # exact recheck in float64, by differences
            row = near[which] + rows.start
            for part in torch.arange(len(row), device=row.device).split(_BLOCK_ROWS):
                distance = (self.points[row[part]].double() - exact[centre[part]]).square_().sum(1)
                self.nearest.scatter_reduce_(0, row[part], distance, "amin")

    def _centred(self, vectors: torch.Tensor) -> torch.Tensor:
        # A float64 row is rounded after the subtraction, so that its error too stays relative to the centred row.
        return (vectors - self.mean).float() if vectors.dtype == torch.float64 else vectors.float() - self.mean

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.points), _BLOCK_ROWS):
            yield slice(start, min(start + _BLOCK_ROWS, len(self.points)))


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


def check_random_state(value: Any) -> None:
    """Raise a ValueError unless ``value`` is None or a whole number that torch takes as a seed."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < 2**63):
        msg = f"random_state must be None or a whole number from 0 on, got {value!r}."
        raise ValueError(msg)


def _as_matrix(embeddings: torch.Tensor | ArrayLike) -> torch.Tensor:
    if isinstance(embeddings, np.ndarray):
        embeddings = np.ascontiguousarray(embeddings)  # torch takes no negative strides
    points = torch.as_tensor(embeddings).detach()
    if points.is_complex():
        msg = f"embeddings must be real numbers, got {points.dtype}."
        raise ValueError(msg)
    if points.ndim != 2 or 0 in points.shape:
        msg = f"embeddings must be a matrix (N, D) with at least one row and one column, got shape {tuple(points.shape)}."
        raise ValueError(msg)
    if not points.is_floating_point():
        points = points.double()
    if not all(bool(part.isfinite().all()) for part in points.split(_BLOCK_ROWS)):
        msg = "embeddings hold NaN or infinite values; farthest-first distances are not defined on them."
        raise ValueError(msg)
    return points


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Keep float32 products float32: the filter's error bound does not hold for the bf16 or TF32 a user may allow."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9 and later
        settings = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.mkldnn.matmul, "fp32_precision")]
        before = [getattr(*setting) for setting in settings]
        for setting in settings:
            setattr(*setting, "ieee")
        restore = [partial(setattr, *setting, value) for setting, value in zip(settings, before, strict=True)]
    else:
        restore = [partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())]
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for action in restore:
            action()


def _progress_bar(*, enabled: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), disable=not enabled)
