"""Regions: connected parts of an anomaly map above a threshold, or parts with small gaps between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_plugin.bundle import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Region(Box):
    """A connected part of an anomaly map, with its bounding box in whole pixels (int).

    Attributes:
        left: First column.
        top: First row.
        width: Number of columns.
        height: Number of rows.
        area: Number of pixels above the threshold.
        peak: Largest value, in feature units.
        mm_per_pixel: Side of a pixel, in mm; None if unknown.
    """

    area: int
    peak: float
    mm_per_pixel: float | None = None

    @property
    def mm(self) -> Millimeters | None:
        """The region's size; None where that of a pixel is unknown."""
        side = self.mm_per_pixel
        if side is None:
            return None
        return Millimeters(*(float(f"{size:.6g}") for size in (self.width * side, self.height * side, self.area * side**2)))


class Millimeters(NamedTuple):
    """Size of a region.

    Attributes:
        width: Width of its bounding box, in mm.
        height: Height of its bounding box, in mm.
        area: Area above the threshold, in mm².
    """

    width: float
    height: float
    area: float


def find_regions(values: NDArray[np.float32], threshold: float, gaps: tuple[int, int] = (0, 0)) -> list[Region]:
    """Find the connected parts of a map above a threshold. Pixels that touch at a corner are connected.

    Args:
        values: Anomaly map (H, W).
        threshold: Value that a pixel of a region exceeds.
        gaps: Rows and columns between two pixels up to which they are connected too.

    Returns:
        The regions, the highest peak first.
    """
    above = values > threshold
    rows, starts, ends = _runs(above)
    if any(gaps) and len(rows):
        # Two pixels are that near if these rectangles of theirs, to the right and down, touch or overlap.
        wide = _dilated(_dilated(above, gaps[0], 0), gaps[1], 1)
        wide_rows, wide_starts, wide_ends = _runs(wide)
        joined = _join_touching(wide_rows, wide_starts, wide_ends, len(values))
        columns = values.shape[1]
        around = np.searchsorted(wide_rows * columns + wide_starts, rows * columns + starts, "right") - 1
        roots = [joined[run] for run in around]
    else:
        roots = _join_touching(rows, starts, ends, len(values))
    members: dict[int, list[int]] = {}
    for run, root in enumerate(roots):
        members.setdefault(root, []).append(run)
    found = []
    for runs in members.values():
        top, left, right = int(rows[runs].min()), int(starts[runs].min()), int(ends[runs].max())
        peak = max(float(values[rows[run], starts[run] : ends[run]].max()) for run in runs)
        area = int((ends[runs] - starts[runs]).sum())
        found.append(Region(left, top, right - left, int(rows[runs].max()) - top + 1, area, peak))
    return sorted(found, key=lambda region: -region.peak)


def _runs(above: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, first column, and first column after it, of each run of pixels, row by row and from left to right."""
    steps = np.diff(np.pad(above, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]


def _dilated(above: NDArray[np.bool_], count: int, axis: int) -> NDArray[np.bool_]:
    """Pixels that are set, or have one that is set among the ``count`` before them."""
    sums = np.moveaxis(np.cumsum(above, axis=axis, dtype=np.int32), axis, 0)
    within = sums.copy()
    within[count + 1 :] -= sums[: max(0, len(sums) - count - 1)]
    return np.moveaxis(within > 0, 0, axis)


def _join_touching(rows: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64], height: int) -> list[int]:
    """Join each run with those of the row above that it touches; gives the number of one run of its region for each run."""
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1))
    for row in range(1, height):
        upper, lower = first_of_row[row - 1], first_of_row[row]
        while upper < first_of_row[row] and lower < first_of_row[row + 1]:
            if starts[upper] <= ends[lower] and starts[lower] <= ends[upper]:
                parents[root(lower)] = root(upper)
            if ends[upper] < ends[lower]:
                upper += 1
            else:
                lower += 1
    return [root(run) for run in range(len(rows))]
