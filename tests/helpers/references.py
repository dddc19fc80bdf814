"""Slow, obvious references in float64, for tests of the fast code."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.distance import cdist


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N, k) to the ``k`` nearest vectors, the nearest first, and their indices (N, k); ties by lowest index."""
    distances = cdist(queries, vectors)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


def covering_radius(points: np.ndarray, bank: np.ndarray) -> float:
    """Largest distance of a point to its nearest bank vector."""
    return float(cdist(points, bank).min(1).max())


def farthest_first(
    points: np.ndarray, centers: np.ndarray, size: float = math.inf, radius: float = 0
) -> tuple[list[int], float]:
    """Pick the farthest point from all centers and picks, one at a time; ties by lowest index.

    Args:
        points: Points (N, D).
        centers: Centers (K, D) to start from.
        size: Number of picks at most.
        radius: Covering radius at which to stop.

    Returns:
        The picks and the covering radius that they reach.
    """
    points = points.astype(np.float64)
    squares = cdist(points, centers, "sqeuclidean").min(1)
    picks = []
    while len(picks) < size and math.sqrt(squares.max(initial=0)) > radius:
        picks.append(int(squares.argmax()))
        squares = np.minimum(squares, ((points - points[picks[-1]]) ** 2).sum(1))
    return picks, math.sqrt(squares.max(initial=0))
