"""The choice of a memory bank's index, by measurement on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import IndexTrial
from patchcore_plugin.memory_bank.bank import MemoryBank
from patchcore_plugin.memory_bank.indexes import KINDS
from patchcore_plugin.progress import no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind, Storage
    from patchcore_plugin.progress import Progress
    from patchcore_plugin.scoring import ScoreRule

MIN_RECALL = 0.999
"""Least share of patches whose nearest bank vector an index must find, for :func:`choose` to take it."""

MAX_ERROR = 1e-3
"""Largest relative error of the distance, at the 99.9th percentile of the patches, for :func:`choose` to take an index."""

_SLOWDOWN_LIMIT = 1.5  # wider searches are not tried where one takes this many times as long as the fastest good one
_NEAREST_TOLERANCE = 1e-5  # relative difference of distances up to which a vector found counts as the nearest


def choose(
    vectors: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    rule: ScoreRule,
    index: IndexKind | None = None,
    storage: Storage = "float32",
    progress: Progress = no_progress,
    threads: int | None = None,
    least: int = 0,
) -> tuple[MemoryBank, list[IndexTrial]]:
    """Build the fastest memory bank that answers as exact search does.

    Each index is measured by scoring images, one at a time. Its search is as narrow as recall and distance error allow
    (:data:`MIN_RECALL`, :data:`MAX_ERROR`). Both are taken against exact search in the same storage.

    Args:
        vectors: Bank vectors (M, D), float32.
        embeddings: Patch embeddings (B, h, w, D), float32, of normal images whose patches are not in the bank.
        rule: How patch distances become an image score.
        index: Only kind of index to consider. Where it is not good enough at any width, the widest search is taken. None
            considers every kind that suits the bank and this machine; exact search is always among them.
        storage: Number format in which the bank keeps its vectors.
        progress: Called as each step begins.
        threads: Number of threads to search with, as in serving; see :attr:`MemoryBank.threads`.
        least: Least width to consider, for a bank of kind ``index`` that grows; 0 for a new one. A grown ``"bfloat16"`` bank
            may become flat.

    Returns:
        The bank, with its width set and its neighbors found, and all trials, among them that of the bank.
    """
    flat = MemoryBank(vectors, "flat", storage)
    flat.threads = threads
    reference = _Reference.of(flat, vectors, embeddings, rule)
    progress("neighbors", 0, 1)
    flat.find_neighbors(rule.num_neighbors)
    tried: list[tuple[IndexTrial, MemoryBank]] = []
    for kind in _kinds(vectors.shape, index, storage, least):
        progress(f"index {kind}", 0, 1)
        bank = flat if kind == "flat" else MemoryBank(vectors, kind, storage)
        bank.neighbors, bank.threads = flat.neighbors, threads
        for width in _widths(kind, least):
            bank.width = width
            trial = reference.measure(bank)
            tried.append((trial, bank))
            fastest = min((other.milliseconds for other, _ in tried if other.good), default=np.inf)
            if trial.good or trial.milliseconds > _SLOWDOWN_LIMIT * fastest:
                break  # wider searches take longer
    best, bank = min([pair for pair in tried if pair[0].good] or tried[-1:], key=lambda pair: pair[0].milliseconds)
    bank.width = best.width
    if bank.neighbors is None:  # the bank is too large for a comparison of all vectors: its index searches for neighbors
        bank.find_neighbors(rule.num_neighbors)
    return bank, [trial for trial, _ in tried]


def _kinds(shape: tuple[int, int], index: IndexKind | None, storage: Storage, least: int) -> list[IndexKind]:
    """Kinds of index to try for a bank of vectors (M, D)."""
    if index is None:
        return [kind for kind, known in KINDS.items() if known.suits(*shape, storage)]
    fallback = KINDS[index].fallback
    if not least or fallback is None:
        return [index]
    return [index, fallback] if KINDS[index].suits(*shape, storage) else [fallback]


def _widths(kind: IndexKind, least: int) -> list[int]:
    """Widths to try, the narrowest first."""
    least = min(least, KINDS[kind].width_limits[1])
    return [width for width in KINDS[kind].widths if width >= least] or [least]


@dataclass(frozen=True)
class _Reference:
    """What exact search answers for images, and how an index compares.

    Attributes:
        embeddings: Patch embeddings (B, h, w, D).
        inspected: Those of the inspected patches (B, 1, P, D); without a region of interest, all of them.
        rule: How patch distances become an image score.
        stored: Distance of each inspected patch to the nearest vector as it is stored (B * P,).
        exact: Distance of each inspected patch to the nearest float32 vector (B * P,).
    """

    embeddings: NDArray[np.float32]
    inspected: NDArray[np.float32]
    rule: ScoreRule
    stored: NDArray[np.float32]
    exact: NDArray[np.float32]

    @classmethod
    def of(
        cls, flat: MemoryBank, vectors: NDArray[np.float32], embeddings: NDArray[np.float32], rule: ScoreRule
    ) -> _Reference:
        exact = flat
        if flat.storage != "float32":
            exact = MemoryBank(vectors)
            exact.threads = flat.threads
        inspected = rule.inspected(embeddings)
        return cls(embeddings, inspected, rule, flat.nearest(inspected)[0], exact.nearest(inspected)[0])

    def measure(self, bank: MemoryBank) -> IndexTrial:
        """Measure a bank's recall and distance error on all images, and its time for one image."""
        distances = bank.nearest(self.inspected)[0]
        smallest = 1e-6 * max(float(self.exact.max()), 1e-30)  # rounding may move a distance away from 0 by this much
        recall = float(np.mean(distances <= self.stored * (1 + _NEAREST_TOLERANCE) + smallest))
        error, storage_error = (
            float(np.quantile(np.abs(values - true) / np.maximum(true, smallest), 0.999))
            for values, true in ((distances, self.stored), (self.stored, self.exact))
        )
        return IndexTrial(
            index=bank.index,
            storage=bank.storage,
            width=bank.width,
            milliseconds=self._milliseconds(bank),
            recall=recall,
            error=error,
            storage_error=storage_error,
            good=recall >= MIN_RECALL and error <= MAX_ERROR,
        )

    def _milliseconds(self, bank: MemoryBank) -> float:
        """Median time to score one image."""
        times = []
        for image in self.embeddings:
            started = time.perf_counter()
            bank.score(image[None], self.rule)
            times.append(time.perf_counter() - started)
        return 1000 * float(np.median(times))
