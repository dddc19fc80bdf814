"""The vectors that extend a memory bank to new images, picked without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.progress import Progress

_BLOCK_ROWS = 4096  # points whose differences from a center are in memory at a time


def farthest_first(
    points: NDArray[np.float32],
    distances: NDArray[np.float32],
    radius: float,
    progress: Progress = no_progress,
) -> NDArray[np.int64]:
    """Pick the farthest point as the next center, until every point lies within a radius of a center.

    :class:`patchcore_plugin.coreset.GreedyCoreset` picks a whole coreset by the same rule, faster, with torch.

    Args:
        points: Points (N, D), float32.
        distances: Distance of each point to the nearest center that exists already (N,), float32.
        radius: Largest distance that a point may keep from its nearest center, in the unit of the distances.
        progress: Called with the number of points that are covered.

    Returns:
        Indices (K,) of the picked points, int64, in the order of picking. Of points equally far, the first is picked.
    """
    remaining, picks, total = np.arange(len(points)), [], len(points)
    distances = distances.copy()
    while len(remaining):
        farthest = int(distances.argmax())
        if distances[farthest] <= radius:
            break
        picks.append(remaining[farthest])
        center = points[farthest].copy()
        for start in range(0, len(points), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            difference = points[rows] - center
            np.minimum(distances[rows], np.sqrt(np.einsum("nd,nd->n", difference, difference)), out=distances[rows])
        uncovered = distances > radius
        if 2 * uncovered.sum() < len(remaining):  # copying the rest is worth its time
            points, distances, remaining = points[uncovered], distances[uncovered], remaining[uncovered]
            progress("cover new images", total - len(remaining), total)
    progress("cover new images", total, total)
    return np.array(picks, np.int64)
