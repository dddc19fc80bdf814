"""Regions: connected parts of an anomaly map above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """

    area: int
    peak: float


def find_regions(values: NDArray[np.float32], threshold: float) -> list[Region]:
    """Find the connected parts of a map above a threshold. Pixels that touch at a corner are connected.

    Args:
        values: Anomaly map (H, W).
        threshold: Value that a pixel of a region exceeds.

    Returns:
        The regions, the highest peak first.
    """
    above = np.pad(values > threshold, ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(above, axis=1)
    rows, starts = np.nonzero(steps == 1)  # runs of pixels above the threshold, row by row and from left to right
    ends = np.nonzero(steps == -1)[1]  # first column after each run
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
