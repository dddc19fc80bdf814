"""The kinds of index that a memory bank can have, one class each.

A new kind is one class here, a name in :data:`KINDS`, and the same name in :data:`patchcore_plugin.bundle.IndexKind`. The
choice by measurement, the files, the command line and the service go by these.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.cpu import has_bfloat16, outside_fork
from patchcore_plugin.memory_bank.bfloat16 import CANDIDATES_LIMIT, BFloat16Candidates
from patchcore_plugin.memory_bank.faiss_index import (
    BLOCK_ROWS,
    QUANTIZERS,
    ApproximateIndex,
    FaissIndex,
    exact_distances,
    plain_storage,
)
from patchcore_plugin.memory_bank.layout import Header, check, check_graph, check_lists, check_projection, is_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import IndexKind, Storage
    from patchcore_plugin.memory_bank.faiss_index import Found
    from patchcore_plugin.memory_bank.layout import IndexFile


class FlatIndex(FaissIndex):
    """Compares each query with every vector: exact search."""

    kind, magics = "flat", (b"IxF2", b"IxSQ")
    default_width, widths, width_limits = 0, (0,), (0, 0)
    min_vectors = 1
    exhaustive = True
    _EXACT_QUERIES_LIMIT = 16  # for more queries, FAISS expands the square of the difference

    @staticmethod
    def _new(size: int, dimension: int, quantizer: int | None) -> faiss.Index:
        return faiss.IndexFlatL2(dimension) if quantizer is None else faiss.IndexScalarQuantizer(dimension, quantizer)

    @classmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """See :meth:`FaissIndex.recognize`."""
        flat = isinstance(index, (faiss.IndexFlat, faiss.IndexScalarQuantizer))
        return plain_storage(index) if flat else None

    @classmethod
    def check_file(cls, file: IndexFile, header: Header) -> None:
        """See :meth:`FaissIndex.check_file`."""
        if header.magic == b"IxF2":
            file.vectors(header)
        else:
            file.codes(header)

    def _search_block(self, queries: NDArray[np.float32], k: int, width: int) -> Found:
        if len(queries) <= self._EXACT_QUERIES_LIMIT:
            squares, indices = self._search_faiss(queries, k)
            return np.sqrt(squares), indices
        # The expansion loses digits where a query is close to a vector, so the distances are computed anew. Its matrix
        # products are several times faster with all threads on one than with one thread on each of several parts.
        return self._sorted(queries, self.threads.together(self.faiss.search, queries, k)[1])


class BFloat16Index(FlatIndex):
    """Compares each patch exactly with a few candidates, which a matrix product in bfloat16 finds among all vectors.

    The width is the number of candidates. The file is that of a flat index, and :meth:`search` is exact.
    """

    kind, magics = "bfloat16", (b"IxF2",)
    storages = ("float32",)
    default_width, widths, width_limits = 4, (2, 3, 4), (1, CANDIDATES_LIMIT)
    min_vectors = FaissIndex.min_vectors
    fallback = "flat"
    _BANK_VALUES_LIMIT = 2**25  # the matrix product needs twice the memory of the vectors

    def __init__(self, index: faiss.Index) -> None:
        super().__init__(index)
        self._candidates: BFloat16Candidates | None = None
        self._lock = Lock()

    @classmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """See :meth:`FaissIndex.recognize`; the file is that of a flat index in float32."""
        storage = super().recognize(index)
        return storage if storage in cls.storages else None

    @classmethod
    def suits(cls, size: int, dimension: int, storage: Storage) -> bool:
        """See :meth:`FaissIndex.suits`; the CPU must compute in bfloat16, and the memory suffice."""
        return super().suits(size, dimension, storage) and size * dimension <= cls._BANK_VALUES_LIMIT and has_bfloat16()

    def nearest(self, queries: NDArray[np.float32], grid: tuple[int, int], width: int) -> Found:
        """Find the nearest vector of each patch among its candidates; see :meth:`FaissIndex.nearest`."""
        distances, indices = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
        candidates_of, last = self._candidates_of(width), max(0, len(queries) - BLOCK_ROWS)
        for start in range(0, len(queries), BLOCK_ROWS):
            first = min(start, last)  # blocks of one size: each size is a network to compile
            rows = slice(first, first + BLOCK_ROWS)
            candidates = candidates_of.find(queries[rows])
            tried = exact_distances(queries[rows], self.take(candidates))
            best = tried.argmin(1)[:, None]
            distances[rows] = np.take_along_axis(tried, best, 1)[:, 0]
            indices[rows] = np.take_along_axis(candidates, best, 1)[:, 0]
        return distances, indices

    def _candidates_of(self, width: int) -> BFloat16Candidates:
        with self._lock:
            made = self._candidates
            if made is None or (made.process, made.count, made.threads) != (os.getpid(), width, self.threads.count):
                made = self._candidates = BFloat16Candidates(self.vectors, width, self.threads.count)
            return made


class IVFIndex(ApproximateIndex):
    """Compares each query with the vectors in the nearest cells of a k-means partition.

    The width is the number of cells.
    """

    kind, magics = "ivf", (b"IwFl", b"IwSq")
    default_width, widths = 16, (1, 2, 4, 8, 16, 32, 64, 128)

    def __init__(self, index: faiss.IndexIVF) -> None:
        super().__init__(index)
        # The table of the cell that each vector is in, so that it can be read by its bank index. A file's is not trusted.
        index.set_direct_map_type(faiss.DirectMap.NoMap)
        index.make_direct_map()

    @staticmethod
    def _new(size: int, dimension: int, quantizer: int | None) -> faiss.Index:
        centers, cells = faiss.IndexFlatL2(dimension), max(1, min(size // 8, round(2 * size**0.5)))
        if quantizer is None:
            index = faiss.IndexIVFFlat(centers, dimension, cells)
        else:
            index = faiss.IndexIVFScalarQuantizer(centers, dimension, cells, quantizer, faiss.METRIC_L2, False)
        index.cp.min_points_per_centroid = 1  # k-means would warn, as a bank has few vectors for each cell
        return index

    @classmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """See :meth:`FaissIndex.recognize`; the cells must hold the vectors themselves."""
        cells = (
            isinstance(index, faiss.IndexIVF) and index.quantizer.metric_type == faiss.METRIC_L2 and not index.by_residual
        )
        return plain_storage(index) if cells else None

    @classmethod
    def check_file(cls, file: IndexFile, header: Header) -> None:
        """See :meth:`FaissIndex.check_file`."""
        cells, visited = file.numbers("QQ")
        centers = file.header()
        fits = (centers.magic, centers.dimension, centers.count) == (b"IxF2", header.dimension, cells)
        check(fits and 1 <= visited <= cells, "its cells are not around centers among its vectors")
        check(is_finite(file.vectors(centers)), "the centers of its cells are not finite")
        (kind,) = file.numbers("B")  # of the table in which cell each vector is, which is not trusted
        check(len(file.array("<i8")) == (header.count if kind else 0) and kind in (0, 1), "its table of cells is damaged")
        size = header.dimension * 4
        if header.magic == b"IwSq":
            size = file.quantizer(header)
            check(file.numbers("QB") == (size, 0), "its cells do not hold the vectors themselves")
        check_lists(file, header, cells, size)

    def _parameters(self, k: int, width: int) -> faiss.SearchParameters:
        return faiss.SearchParametersIVF(nprobe=min(width, self.faiss.nlist))

    def _search_all(self, queries: NDArray[np.float32], k: int) -> Found:
        squares, indices = self._search_faiss(queries, k, self._parameters(k, self.faiss.nlist))
        return np.sqrt(squares), indices


class HNSWIndex(ApproximateIndex):
    """Follows a graph from vector to vector, towards each query. Building it takes 0.05 to 0.5 ms a vector.

    The width is the number of candidates that are kept on the way.
    """

    kind, magics = "hnsw", (b"IHNf", b"IHNs")
    default_width = 32
    widths = (6, 8, 9, 10, 11, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384)
    _LINKS = 24  # neighbors of a vector in the graph
    _BUILD_WIDTH, _LARGE_BUILD_WIDTH = 80, 200
    _LARGE_GRAPH_VECTORS = 10_000  # in a graph of more, searches would lose their way

    @classmethod
    def _new(cls, size: int, dimension: int, quantizer: int | None) -> faiss.Index:
        if quantizer is None:
            index = faiss.IndexHNSWFlat(dimension, cls._LINKS)
        else:
            index = faiss.IndexHNSWSQ(dimension, quantizer, cls._LINKS)
        index.hnsw.efConstruction = cls._BUILD_WIDTH if size < cls._LARGE_GRAPH_VECTORS else cls._LARGE_BUILD_WIDTH
        return index

    @classmethod
    def suits(cls, size: int, dimension: int, storage: Storage) -> bool:
        """See :meth:`FaissIndex.suits`; for wide vectors, :class:`ReducedIndex` is the faster graph."""
        return super().suits(size, dimension, storage) and dimension < ReducedIndex.WIDE_VALUES

    @classmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """See :meth:`FaissIndex.recognize`; the graph must be built over a flat index."""
        if not isinstance(index, faiss.IndexHNSW) or index.metric_type != faiss.METRIC_L2:
            return None
        inner = cls._inner(index)
        same = (inner.ntotal, inner.d) == (index.ntotal, index.d)
        return FlatIndex.recognize(inner) if same else None

    @classmethod
    def check_file(cls, file: IndexFile, header: Header) -> None:
        """See :meth:`FaissIndex.check_file`."""
        check_graph(file, header)
        storage = file.header()
        magic = {b"IHNf": b"IxF2", b"IHNs": b"IxSQ"}[header.magic]
        check(storage == header._replace(magic=magic), "its graph is not one of its vectors")
        FlatIndex.check_file(file, storage)

    @staticmethod
    def _inner(index: faiss.Index) -> faiss.Index:
        return faiss.downcast_index(index.storage)

    def _parameters(self, k: int, width: int) -> faiss.SearchParameters:
        return faiss.SearchParametersHNSW(efSearch=max(width, k))


class ReducedIndex(ApproximateIndex):
    """Follows a graph over the principal components of the vectors, and compares a query exactly with what it finds.

    Embeddings of hundreds of values lie near a space of few dimensions. The width is the number of candidates that are kept
    on the way; half of them are compared.
    """

    kind, magics = "reduced", (b"IxRF",)
    default_width = 64
    widths = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384)
    _COMPONENTS = 64
    WIDE_VALUES = 2 * _COMPONENTS  # from which on its graph is faster than one over the vectors themselves
    _SAMPLE_VECTORS = 4096  # to find the principal components of

    @classmethod
    def build(cls, vectors: NDArray[np.float32], storage: Storage) -> Self:
        """Build an index of vectors (M, D)."""
        built = cls._new(*vectors.shape, QUANTIZERS.get(storage))
        pipeline = faiss.downcast_index(built.base_index)
        axes = outside_fork(principal_axes, vectors, pipeline.index.d, cls._SAMPLE_VECTORS)
        projection = faiss.downcast_VectorTransform(pipeline.chain.at(0))
        faiss.copy_array_to_vector(axes.reshape(-1), projection.A)
        projection.is_trained = True
        outside_fork(built.train, vectors)
        outside_fork(built.add, vectors)
        return cls(built)

    @classmethod
    def _new(cls, size: int, dimension: int, quantizer: int | None) -> faiss.Index:
        components = min(cls._COMPONENTS, dimension)
        graph = HNSWIndex._new(size, components, None)
        reduced = faiss.IndexPreTransform(faiss.LinearTransform(dimension, components, False), graph)
        return faiss.IndexRefine(reduced, FlatIndex._new(size, dimension, quantizer))

    @classmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """See :meth:`FaissIndex.recognize`; the file's check has found the graph and its projection."""
        return FlatIndex.recognize(cls._inner(index)) if isinstance(index, faiss.IndexRefine) else None

    @classmethod
    def check_file(cls, file: IndexFile, header: Header) -> None:
        """See :meth:`FaissIndex.check_file`."""
        reduced = file.header()
        check(reduced == header._replace(magic=b"IxPT"), "it has no projection of its vectors")
        components = check_projection(file, header.dimension)
        graph = file.header()
        check(graph == Header(b"IHNf", components, header.count), "its graph is not one of its projected vectors")
        check_graph(file, graph)
        storage = file.header()
        check(storage == graph._replace(magic=b"IxF2"), "its graph is not one of its projected vectors")
        check(is_finite(file.vectors(storage)), "its projected vectors are not finite")
        storage = file.header()
        check(storage._replace(magic=header.magic) == header, "it does not hold the vectors that it compares")
        check(storage.magic in FlatIndex.magics, "it does not hold the vectors that it compares")
        FlatIndex.check_file(file, storage)
        file.numbers("f")  # factor of a search without parameters

    @classmethod
    def suits(cls, size: int, dimension: int, storage: Storage) -> bool:
        """See :meth:`FaissIndex.suits`; the vectors must be wide."""
        return super().suits(size, dimension, storage) and dimension >= cls.WIDE_VALUES

    @staticmethod
    def _inner(index: faiss.Index) -> faiss.Index:
        return faiss.downcast_index(index.refine_index)

    def _parameters(self, k: int, width: int) -> faiss.SearchParameters:
        compared = max(k, width // 2)
        graph = faiss.SearchParametersHNSW(efSearch=max(width, compared))
        return faiss.IndexRefineSearchParameters(
            k_factor=-(-compared // k), base_index_params=faiss.SearchParametersPreTransform(index_params=graph)
        )


def principal_axes(vectors: NDArray[np.float32], count: int, sample: int) -> NDArray[np.float32]:
    """Find the axes (count, D), of length 1, along which vectors (M, D) vary most.

    Args:
        vectors: The vectors.
        count: Number of axes, up to D.
        sample: Number of vectors, evenly spaced, by which they are found.
    """
    some = vectors[:: -(-len(vectors) // sample)].astype(np.float64)
    some -= some.mean(0)
    return np.ascontiguousarray(np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :count].T, np.float32)


KINDS: dict[IndexKind, type[FaissIndex]] = {
    index.kind: index for index in (FlatIndex, BFloat16Index, IVFIndex, ReducedIndex, HNSWIndex)
}
"""Every kind of index by its name. A file is read as the first kind that recognizes it."""
