"""Vectors of a coreset that have no like in other images: what does not belong among normal images.

A farthest-first coreset picks what is unlike everything else. Where defective images hide among the normal ones, that is
their defects, which then count as normal. A normal patch, however rare, has likes in some of the other images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from patchcore_plugin.coreset.processes import Shards
from patchcore_plugin.coreset.products import full_float32
from patchcore_plugin.coreset.threads import threads_for

if TYPE_CHECKING:
    import torch.distributed as dist

MIN_IMAGES = 10
"""Fewest images of which vectors are left out: with fewer, what is usual is unknown."""

_PILOT = 4096  # vectors whose distances tell what is usual; with a quarter of them, 15 % more or fewer are left out
_SPREAD_FLOOR = 0.1  # least standard deviation of the distances, as a share of their median
_NORMAL_MAD = 0.6745  # median absolute deviation of a standard normal distribution
_PRODUCT_VALUES = 2**23  # of a matrix product: bounds its memory at 32 MiB


def find_outliers(
    bank: torch.Tensor,
    bank_images: torch.Tensor,
    rows: torch.Tensor,
    row_images: torch.Tensor,
    deviations: float,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Find the vectors of a coreset that lie far from the rows of all other images.

    A vector's distance is that to the second nearest other image, each by its nearest row: one alone may have the same
    defect. An outlier is farther than the median of all vectors by a number of standard deviations, estimated from the
    median absolute deviation. No share of outliers is assumed, but that it is below half.

    Median and deviation are those of 4,096 vectors. Of the others, distances are needed above the limit alone, so most are
    compared with a part of the rows: those of a tenth to a third of the images.

    Args:
        bank: The coreset's vectors (M, D); the same in every process.
        bank_images: Number of the image of each vector (M,), int64.
        rows: Embeddings (N, D) of this process to compare with.
        row_images: Number of the image of each row (N,), int64.
        deviations: Standard deviations above the median.
        group: Processes that hold more of the rows.

    Returns:
        Which vectors are outliers (M,), bool. None is, where there are fewer than :data:`MIN_IMAGES` images or where most
        vectors have exact copies in other images.
    """
    shards = Shards(group)
    outliers = torch.zeros(len(bank), dtype=torch.bool, device=bank.device)
    with torch.inference_mode(), full_float32(bank.device.type), threads_for(rows):
        images = _Images(rows, row_images)
        if len(images.numbers_of_all(shards)) < MIN_IMAGES:
            return outliers
        pilot = torch.linspace(0, len(bank) - 1, min(_PILOT, len(bank)), device=bank.device).long()  # all ages of picks
        distances = _second_distances(bank[pilot], bank_images[pilot], images, None, shards)
        middle = distances.median()
        spread = (distances - middle).abs().median() / _NORMAL_MAD
        if not middle > 0:
            return outliers
        limit = middle + deviations * torch.maximum(spread, _SPREAD_FLOOR * middle)
        outliers[pilot] = distances > limit
        others = torch.ones_like(outliers).index_fill_(0, pilot, False).nonzero().squeeze(1)
        outliers[others] = _second_distances(bank[others], bank_images[others], images, limit, shards) > limit
    return outliers.clone()


class _Images:
    """Rows by image.

    Args:
        rows: Embeddings (N, D).
        numbers: Number of the image of each row (N,).
    """

    def __init__(self, rows: torch.Tensor, numbers: torch.Tensor) -> None:
        self.rows = rows
        runs, lengths = torch.unique_consecutive(numbers, return_counts=True)
        ends = lengths.cumsum(0).tolist()
        # A random order: neighbors in a folder are often alike, and the sooner likes are found the less is to compare.
        order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(0)).tolist()
        runs = runs.tolist()
        self.runs = [(runs[run], ends[run] - int(lengths[run]), ends[run]) for run in order]

    def numbers_of_all(self, shards: Shards) -> set[int]:
        """Numbers of the images of all processes."""
        mine = torch.tensor(sorted({number for number, *_ in self.runs}), dtype=torch.int64, device=self.rows.device)
        counts = shards.gather(torch.tensor([len(mine)], device=mine.device))
        padded = mine.new_full((int(counts.max()),), -1)
        padded[: len(mine)] = mine
        return set(shards.gather(padded).tolist()) - {-1}


class _Nearest:
    """The two nearest other images of some vectors.

    Attributes:
        squares: Squared distances (M, 2), float32, the nearer first; infinite where there is no such image.
        images: Numbers of the images (M, 2), int64; -1 for none.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.squares = torch.full((count, 2), torch.inf, device=device)
        self.images = torch.full((count, 2), -1, dtype=torch.int64, device=device)

    def add(self, places: torch.Tensor, squares: torch.Tensor, images: torch.Tensor) -> None:
        """Take in another image for each of some vectors: squared distances (P,), and numbers of the images (P,)."""
        (first, second), (first_image, second_image) = self.squares[places].T, self.images[places].T
        # An image may come in several parts: the one that is there already keeps its smaller distance.
        squares = torch.where(images == first_image, torch.minimum(squares, first), squares)
        first = torch.where(images == first_image, torch.inf, first)
        second = torch.where(images == second_image, torch.minimum(second, squares), second)
        squares = torch.where(images == second_image, torch.inf, squares)
        all_squares = torch.stack([first, second, squares], 1)
        all_images = torch.stack([first_image, second_image, images], 1)
        found, order = all_squares.sort(dim=1, stable=True)
        self.squares[places] = found[:, :2]
        self.images[places] = all_images.gather(1, order[:, :2])


def _second_distances(
    vectors: torch.Tensor, vector_images: torch.Tensor, images: _Images, limit: torch.Tensor | None, shards: Shards
) -> torch.Tensor:
    """Distance (M,) of each vector to the second nearest other image; where it is below ``limit``, any such value."""
    if not len(vectors):
        return torch.empty(0, device=vectors.device)
    mean = vectors.float().mean(0)  # what both sides share would cost the product its digits
    centered = vectors.float() - mean
    lengths = centered.square().sum(1)
    nearest = _Nearest(len(vectors), vectors.device)
    open_ = torch.arange(len(vectors), device=vectors.device)
    for image, start, end in images.runs:
        part = images.rows[start:end].float() - mean
        squares = _nearest_rows(centered, lengths, open_, part)
        other = vector_images[open_] != image
        places = open_[other]
        nearest.add(places, squares[other], torch.full_like(places, image))
        if limit is not None:
            open_ = open_[nearest.squares[open_, 1] > limit * limit]
            if not len(open_):
                break
    found = _Nearest(len(vectors), vectors.device)
    places = torch.arange(len(vectors), device=vectors.device)
    for squares, numbers in zip(shards.gather(nearest.squares[None]), shards.gather(nearest.images[None]), strict=True):
        for column in range(2):
            found.add(places, squares[:, column], numbers[:, column])
    return found.squares[:, 1].clamp_min(0).sqrt()


def _nearest_rows(centered: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Squared distances of vectors to the nearest row of a part (P,)."""
    squares = part.square().sum(1)
    found = [
        torch.addmm(squares, centered[some], part.T, alpha=-2).amin(1) + lengths[some]
        for some in places.split(max(1, _PRODUCT_VALUES // len(part)))
    ]
    return torch.cat(found)
