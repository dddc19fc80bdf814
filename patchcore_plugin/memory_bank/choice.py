"""The choice of a memory bank's index, by measurement on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import IndexTrial
from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.memory_bank.bank import MemoryBank

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind, Storage
    from patchcore_plugin.scoring import ScoreRule

RECALL = 0.999
"""Least share of patches whose nearest bank vector an index must find, for :func:`choose` to take it."""

ERROR = 1e-3
"""Largest relative error of the distance, at the 99.9th percentile of the patches, for :func:`choose` to take an index."""

# Kinds of search and the widths to try, the narrowest first. A flat index of some width is a product in bfloat16.
_EXACT, _PRODUCT = ("flat", (0,)), ("flat", (2, 3, 4))
_SEARCHES: tuple[tuple[IndexKind, tuple[int, ...]], ...] = (
    _EXACT,
    _PRODUCT,
    ("ivf", (1, 2, 4, 8, 16, 32, 64, 128)),
    ("hnsw", (6, 8, 9, 10, 11, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384)),
)
_LARGEST_PRODUCT = 2**25  # values of a bank for whose product there is memory
_SMALL = 500  # vectors: fewer are compared with as fast as any index finds its way


def choose(
    vectors: NDArray[np.float32],
    embeddings: NDArray[np.float32],
    rule: ScoreRule,
    index: IndexKind | None = None,
    storage: Storage = "float32",
    progress: Callable[[str], object] | None = None,
    threads: int | None = None,
    least: int = 0,
) -> tuple[MemoryBank, list[IndexTrial]]:
    """Build the fastest memory bank that answers as exact search does.

    Every index is searched as an image's score and map need it, one image at a time, and as narrowly as its recall@1 and
    the error of its distances allow (:data:`RECALL`, :data:`ERROR`), both against exact search in the same storage.

    Args:
        vectors: Bank vectors (M, D), float32.
        embeddings: Patch embeddings (B, h, w, D) of normal images that are not in the bank.
        rule: How the model scores images.
        index: Consider this one only. Where it cannot answer well enough, it is searched as widely as is ever tried. A flat
            one is exact unless ``least`` is given.
        storage: Precision in which the bank keeps its vectors.
        progress: Called with what is done next.
        threads: Threads to search with, as serving does; None leaves it to FAISS.
        least: Least width to consider.

    Returns:
        The bank, its width set and its neighbours found, and what was measured, the index taken among it. Exact search is
        taken where no other answers well enough.
    """
    queries = embeddings.reshape(-1, embeddings.shape[-1])
    flat = MemoryBank(vectors, "flat", storage)
    nearest = flat.search(queries)[0][:, 0]
    exact = nearest if storage == "float32" else MemoryBank(vectors).search(queries)[0][:, 0]
    trials: list[IndexTrial] = []
    banks: dict[str, MemoryBank] = {}
    if progress:
        progress("neighbours")
    flat.find_neighbors(rule.num_neighbors)
    for kind, widths in _searches(vectors.shape, index, storage, least):
        if kind not in banks:
            if progress:
                progress(f"index {kind}")
            banks[kind] = flat if kind == "flat" else MemoryBank(vectors, kind, storage)
            banks[kind].neighbors = flat.neighbors
            banks[kind].threads = threads
        bank = banks[kind]
        for width in widths:
            bank.width = width
            trial = _try(bank, embeddings, nearest, exact, rule)
            trials.append(trial)
            fastest = min((other.milliseconds for other in trials if other.good), default=np.inf)
            if trial.good or trial.milliseconds > 1.5 * fastest:
                break  # wider ones take longer
    good = [trial for trial in trials if trial.good] or trials[-1:]
    best = min(good, key=lambda trial: trial.milliseconds)
    bank = banks[best.index]
    bank.width = best.width
    if bank.neighbors is None:  # too many to compare each with each: the index searches for them
        bank.find_neighbors(rule.num_neighbors)
    return bank, trials


def _searches(
    shape: tuple[int, int], index: IndexKind | None, storage: Storage, least: int
) -> list[tuple[IndexKind, tuple[int, ...]]]:
    """Kinds of search and widths to try in a bank of vectors (M, D)."""
    size, dimension = shape
    product = has_bfloat16() and storage == "float32" and size * dimension <= _LARGEST_PRODUCT
    if index is None:
        searches = [_EXACT] if size < _SMALL else [each for each in _SEARCHES if each != _PRODUCT or product]
    elif index == "flat":
        searches = [_PRODUCT, _EXACT] if least and product else [_EXACT]
    else:
        searches = [each for each in _SEARCHES if each[0] == index]
    return [(kind, tuple(width for width in widths if width >= least or not width) or (least,)) for kind, widths in searches]


def _try(
    bank: MemoryBank,
    embeddings: NDArray[np.float32],
    nearest: NDArray[np.float32],
    exact: NDArray[np.float32],
    rule: ScoreRule,
) -> IndexTrial:
    """Measure a bank; the patches' true distances (N,) are ``nearest`` to its vectors, ``exact`` to those in float32."""
    distances = bank.nearest(embeddings)[0]
    smallest = 1e-6 * max(float(exact.max()), 1e-30)  # a patch of the bank is at distance 0, and rounding may differ
    found = distances <= nearest * (1 + 1e-5) + smallest
    error, storage_error = (
        float(np.quantile(np.abs(values - true) / np.maximum(true, smallest), 0.999))
        for values, true in ((distances, nearest), (nearest, exact))
    )
    times = []
    for image in embeddings:
        started = time.perf_counter()
        bank.score(image[None], rule)
        times.append(time.perf_counter() - started)
    recall = float(found.mean())
    return IndexTrial(
        index=bank.index,
        storage=bank.storage,
        width=bank.width,
        milliseconds=1000 * float(np.median(times)),
        recall=recall,
        error=error,
        storage_error=storage_error,
        good=recall >= RECALL and error <= ERROR,
    )
