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

MAX_SCORE_ERROR = 1e-3
"""Largest relative error of an image score, at the 99.9th percentile of the images, for :func:`choose` to take an index."""

MAX_MAP_ERROR = 1e-2
"""Largest error of a patch's distance, at the 99.9th percentile of the patches, for :func:`choose` to take an index.

As a share of the largest distance in a normal image (the median over the images), above which thresholds lie.
"""

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
    pasted: NDArray[np.float32] | None = None,
) -> tuple[MemoryBank, list[IndexTrial]]:
    """Build the fastest memory bank that answers as exact search does.

    Each index is measured by scoring images, one at a time. Its search is as narrow as the errors of the image scores and of
    the patches' distances allow (:data:`MAX_SCORE_ERROR`, :data:`MAX_MAP_ERROR`), against exact search in the same storage:
    what a user sees. How many nearest vectors a search misses does not matter by itself, and is told beside.

    Args:
        vectors: Bank vectors (M, D), float32.
        embeddings: Patch embeddings (B, h, w, D), float32, of normal images whose patches are not in the bank.
        rule: How patch distances become an image score.
        index: Only kind of index to consider. Where it is not good enough at any width, the widest search is taken. None
            considers every kind that suits the bank and this machine; exact search is always among them.
        storage: Number format in which the bank keeps its vectors.
        progress: Called as each step begins.
        threads: Number of threads to search with, as in serving; see :attr:`MemoryBank.threads`.
        least: Least width to consider, for a bank of kind ``index`` that grows; 0 for a new one. A grown bank becomes flat
            where it is good enough at no width, or where exact search is faster by then.
        pasted: Patch embeddings (C, h, w, D), float32, of images with something that the bank does not know; see
            :mod:`patchcore_plugin.pasting`. They count for the errors, and not for the time.

    Returns:
        The bank, with its width set and its neighbors found, and all trials, among them that of the bank.
    """
    flat = MemoryBank(vectors, "flat", storage)
    flat.threads = threads
    progress("neighbors", 0, 1)
    flat.find_neighbors(rule.num_neighbors)
    progress("index flat", 0, 1)
    images = embeddings if pasted is None else np.concatenate([embeddings, pasted])
    reference = _Reference.of(flat, vectors, images, len(embeddings), rule)
    at_most = reference.answers.milliseconds if least else np.inf  # a grown bank may become flat
    tried: list[tuple[IndexTrial, MemoryBank]] = []
    for kind in _kinds(vectors.shape, index, storage, least):
        if kind != "flat":
            progress(f"index {kind}", 0, 1)
        bank = flat if kind == "flat" else MemoryBank(vectors, kind, storage)
        bank.neighbors, bank.threads = flat.neighbors, threads
        for width in _widths(kind, least):
            bank.width = width
            trial = reference.measure(bank)
            tried.append((trial, bank))
            fastest = min((other.milliseconds for other, _ in tried if other.good), default=at_most)
            if trial.good or trial.milliseconds > _SLOWDOWN_LIMIT * fastest:
                break  # wider searches take longer
    if least and not any(trial.good for trial, _ in tried):
        tried.append((reference.measure(flat), flat))
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
class _Answers:
    """What a bank answers for images, one at a time.

    Attributes:
        scores: Image scores (B,).
        distances: Distance of each inspected patch to the vector found for it (B * P,).
        milliseconds: Median time for one of the images that count for it.
    """

    scores: NDArray[np.float32]
    distances: NDArray[np.float32]
    milliseconds: float

    @classmethod
    def of(cls, bank: MemoryBank, images: NDArray[np.float32], timed: int, rule: ScoreRule) -> _Answers:
        found, times = [], []
        for image in images:
            started = time.perf_counter()
            found.append(bank.score(image[None], rule))
            times.append(time.perf_counter() - started)
        distances = rule.inspected(np.concatenate([scores.patch for scores in found])[..., None])
        scores = np.concatenate([scores.image for scores in found])
        return cls(scores, distances.reshape(-1), 1000 * float(np.median(times[:timed])))


@dataclass(frozen=True)
class _Reference:
    """What exact search answers for images, and how an index compares.

    Attributes:
        images: Patch embeddings (B, h, w, D).
        timed: Number of the first of them, the normal ones, that count for the time.
        rule: How patch distances become an image score.
        flat: The bank that searches exactly, in the same storage.
        answers: Its answers.
        exact: Distance of each inspected patch to the nearest float32 vector (B * P,).
        level: Largest distance in a normal image: the median over them.
    """

    images: NDArray[np.float32]
    timed: int
    rule: ScoreRule
    flat: MemoryBank
    answers: _Answers
    exact: NDArray[np.float32]
    level: float

    @classmethod
    def of(
        cls, flat: MemoryBank, vectors: NDArray[np.float32], images: NDArray[np.float32], timed: int, rule: ScoreRule
    ) -> _Reference:
        answers = _Answers.of(flat, images, timed, rule)
        exact = answers.distances
        if flat.storage != "float32":
            bank = MemoryBank(vectors)
            bank.threads = flat.threads
            exact = bank.nearest(rule.inspected(images))[0]
        level = float(np.median(answers.distances.reshape(len(images), -1)[:timed].max(1)))
        return cls(images, timed, rule, flat, answers, exact, level)

    def measure(self, bank: MemoryBank) -> IndexTrial:
        """Measure a bank's errors on all images, and its time for one image."""
        found = self.answers if bank is self.flat else _Answers.of(bank, self.images, self.timed, self.rule)
        smallest = 1e-6 * max(float(self.exact.max()), 1e-30)  # rounding may move a distance away from 0 by this much
        stored, distances = self.answers.distances, found.distances
        score_error = _largest(np.abs(found.scores - self.answers.scores) / np.maximum(self.answers.scores, smallest))
        map_error = _largest(np.abs(distances - stored) / max(self.level, smallest))
        return IndexTrial(
            index=bank.index,
            storage=bank.storage,
            width=bank.width,
            milliseconds=found.milliseconds,
            recall=float(np.mean(distances <= stored * (1 + _NEAREST_TOLERANCE) + smallest)),
            error=score_error,
            storage_error=_largest(np.abs(stored - self.exact) / np.maximum(self.exact, smallest)),
            good=score_error <= MAX_SCORE_ERROR and map_error <= MAX_MAP_ERROR,
        )


def _largest(errors: NDArray[np.float32]) -> float:
    """The largest error, but for one in a thousand."""
    return float(np.quantile(errors, 0.999))
