"""Regions of an anomaly map above its threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Region:
    """A connected part of an anomaly map.

    Attributes:
        left: First column.
        top: First row.
        width: Columns.
        height: Rows.
        area: Number of pixels above the threshold.
        peak: Largest value, in feature units.
    """

    left: int
    top: int
    width: int
    height: int
    area: int
    peak: float


def find_regions(values: NDArray[np.float32], threshold: float) -> list[Region]:
    """Connected parts of a map (H, W) above ``threshold``, corners touching included, the one of highest peak first."""
    above = np.pad(values > threshold, ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(above, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]  # one behind each run's last column
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    # Runs come row by row, from left to right: each is joined with those of the row above that it touches.
    first_of_row = np.searchsorted(rows, np.arange(values.shape[0] + 1))
    for row in range(1, values.shape[0]):
        upper, lower = first_of_row[row - 1], first_of_row[row]
        while upper < first_of_row[row] and lower < first_of_row[row + 1]:
            if starts[upper] <= ends[lower] and starts[lower] <= ends[upper]:
                parents[root(lower)] = root(upper)
            if ends[upper] < ends[lower]:
                upper += 1
            else:
                lower += 1
    members: dict[int, list[int]] = {}
    for run in range(len(rows)):
        members.setdefault(root(run), []).append(run)
    found = []
    for runs in members.values():
        top, left, right = int(rows[runs].min()), int(starts[runs].min()), int(ends[runs].max())
        peak = max(float(values[rows[run], starts[run] : ends[run]].max()) for run in runs)
        area = int((ends[runs] - starts[runs]).sum())
        found.append(Region(left, top, right - left, int(rows[runs].max()) - top + 1, area, peak))
    return sorted(found, key=lambda region: -region.peak)
