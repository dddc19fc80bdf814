"""FAISS's indexes, as a memory bank builds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import faiss
import numpy as np

from patchcore_plugin.bundle import IndexKind
from patchcore_plugin.memory_bank import file as bank_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LINKS, _CONSTRUCTION = 24, 80  # of the graph: neighbours of a vector, and candidates while it is built,
_LARGE, _LARGE_CONSTRUCTION = 10_000, 200  # which are more where a graph of so many vectors would lose its way
_QUANTIZERS = {storage: quantizer for quantizer, storage in bank_file.STORAGES.items()}


def build(vectors: NDArray[np.float32], index: str, storage: str) -> faiss.Index:
    """An empty index for vectors (M, D); the arguments are those of :class:`patchcore_plugin.memory_bank.MemoryBank`.

    Raises:
        ValueError: If ``index`` is none of its kinds.
    """
    dimension = vectors.shape[1]
    quantizer = _QUANTIZERS.get(storage)
    if index == "flat":
        return faiss.IndexFlatL2(dimension) if quantizer is None else faiss.IndexScalarQuantizer(dimension, quantizer)
    if index == "hnsw":
        graph = (
            faiss.IndexHNSWFlat(dimension, _LINKS) if quantizer is None else faiss.IndexHNSWSQ(dimension, quantizer, _LINKS)
        )
        graph.hnsw.efConstruction = _CONSTRUCTION if len(vectors) < _LARGE else _LARGE_CONSTRUCTION
        return graph
    if index == "ivf":
        cells = faiss.IndexFlatL2(dimension)
        count = max(1, min(len(vectors) // 8, round(2 * len(vectors) ** 0.5)))
        partition = (
            faiss.IndexIVFFlat(cells, dimension, count)
            if quantizer is None
            else faiss.IndexIVFScalarQuantizer(cells, dimension, count, quantizer, faiss.METRIC_L2, False)
        )
        partition.cp.min_points_per_centroid = 1  # or it warns of few points, which is what a bank has
        return partition
    msg = f"index must be one of {', '.join(get_args(IndexKind))}; got {index!r}."
    raise ValueError(msg)


def view(index: faiss.Index) -> NDArray[np.float32]:
    """The vectors (M, D) inside an index that keeps them in float32, not in cells: no copy, read-only."""
    return np.asarray(_Storage(bank_file.storage(index), index))


class _Storage:
    """The vectors (M, D) inside a FAISS index as an array, so that the bank is held once. Keeps the index alive."""

    def __init__(self, storage: faiss.IndexFlat, index: faiss.Index) -> None:
        self._index = index
        flat = faiss.rev_swig_ptr(storage.get_xb(), storage.ntotal * storage.d)
        address = flat.__array_interface__["data"][0]
        self.__array_interface__ = {
            "version": 3,
            "shape": (storage.ntotal, storage.d),
            "typestr": np.dtype(np.float32).str,
            "data": (address, True),  # read only
        }
