"""How a memory bank searches a FAISS index: in blocks, on its own threads, with exact distances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar, get_args

import faiss
import numpy as np

from patchcore_plugin.bundle import MAX_WIDTH, IndexKind, Storage
from patchcore_plugin.cpu import outside_fork
from patchcore_plugin.memory_bank.threads import Threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.memory_bank.layout import Header, IndexFile

    Found = tuple[NDArray[np.float32], NDArray[np.int64]]

BLOCK_ROWS = 4096
"""Number of queries that are searched at once: it bounds the memory of a search."""

QUANTIZERS = {"float16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}
"""FAISS's quantizer of a storage."""

_PARTS_PER_THREAD = 2  # some parts of the queries take longer than others
_QUANTIZED_STORAGES: dict[int, Storage] = {quantizer: storage for storage, quantizer in QUANTIZERS.items()}
# Axis of an image's patch grid (h, w) and step along it, for each of the four patches beside a patch.
_ADJACENT_PATCHES = ((0, 1), (0, -1), (1, 1), (1, -1))


class FaissIndex(ABC):
    """A FAISS index with its vectors, and how a memory bank searches it. Each kind of index is one subclass.

    All distances are Euclidean and exact: computed from the differences between a query and the vector as it is stored.

    Args:
        index: FAISS index, which :meth:`recognize` knows.

    Attributes:
        kind: Name of the kind.
        magics: First four bytes of its files.
        storages: Number formats in which the kind can keep vectors.
        width_limits: Least and greatest width of a search.
        default_width: Width of a search where none is given.
        widths: Widths to measure when an index is chosen, in ascending order.
        min_vectors: Size of a bank from which the kind is worth measuring.
        exhaustive: Whether :meth:`search` compares each query with every vector.
        fallback: Kind that a bank of this kind may change to when it grows; None where it keeps its kind.
        faiss: The FAISS index.
        storage: Number format in which the vectors are kept.
        threads: Threads on which FAISS searches.
    """

    kind: ClassVar[IndexKind]
    magics: ClassVar[tuple[bytes, ...]]
    storages: ClassVar[tuple[Storage, ...]] = get_args(Storage)
    width_limits: ClassVar[tuple[int, int]] = (1, MAX_WIDTH)
    default_width: ClassVar[int]
    widths: ClassVar[tuple[int, ...]]
    min_vectors: ClassVar[int] = 500
    exhaustive: ClassVar[bool] = False
    fallback: ClassVar[IndexKind | None] = None

    def __init__(self, index: faiss.Index) -> None:
        self.faiss = index
        self.storage = self.recognize(index)
        inner = self._inner(index)
        self._array = _array(inner, index) if isinstance(inner, faiss.IndexFlat) else None
        self.threads = Threads(None)

    @classmethod
    def build(cls, vectors: NDArray[np.float32], storage: Storage) -> Self:
        """Build an index of vectors (M, D)."""
        index = cls._new(*vectors.shape, QUANTIZERS.get(storage))
        outside_fork(index.train, vectors)
        outside_fork(index.add, vectors)
        return cls(index)

    @staticmethod
    @abstractmethod
    def _new(size: int, dimension: int, quantizer: int | None) -> faiss.Index:
        """Make the FAISS index for vectors (size, dimension), before it is trained.

        Args:
            size: Number of vectors that the index will hold.
            dimension: Number of values of a vector.
            quantizer: FAISS's quantizer of the storage; None for float32.
        """

    @classmethod
    @abstractmethod
    def recognize(cls, index: faiss.Index) -> Storage | None:
        """Tell in which storage a FAISS index keeps its vectors; None where this kind would not build such an index."""

    @classmethod
    @abstractmethod
    def check_file(cls, file: IndexFile, header: Header) -> None:
        """Check all that FAISS relies on when it reads and searches an index of this kind.

        Args:
            file: The file, read up to the end of its header.
            header: The header.

        Raises:
            UsageError: If the file holds something else than this kind writes.
        """

    @classmethod
    def suits(cls, size: int, dimension: int, storage: Storage) -> bool:
        """Tell whether the kind is worth measuring on this machine, for a bank of vectors (size, dimension)."""
        return storage in cls.storages and size >= cls.min_vectors

    @staticmethod
    def _inner(index: faiss.Index) -> faiss.Index:
        """Return the FAISS index that keeps the vectors: the index itself, unless it is built over another one."""
        return index

    @property
    def vectors(self) -> NDArray[np.float32]:
        """See :attr:`patchcore_plugin.memory_bank.MemoryBank.vectors`."""
        if self._array is not None:
            return self._array
        vectors = self.threads.together(self.faiss.reconstruct_n, 0, self.faiss.ntotal)
        vectors.setflags(write=False)
        return vectors

    def take(self, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Vectors (..., D) of bank indices (...)."""
        if self._array is not None:
            return self._array[indices]
        flat = np.ascontiguousarray(indices.reshape(-1), np.int64)
        return self.threads.alone(self.faiss.reconstruct_batch, flat).reshape(*indices.shape, self.faiss.d)

    def search(self, queries: NDArray[np.float32], k: int, width: int) -> Found:
        """Find the k nearest vectors of each query.

        Args:
            queries: Queries (N, D).
            k: Number of vectors to find for each query; at most the number of vectors in the index.
            width: Width of the search.

        Returns:
            Distances (N, k) in ascending order, and bank indices (N, k).
        """
        distances, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            distances[rows], indices[rows] = self._search_block(queries[rows], k, width)
        return distances, indices

    def nearest(self, queries: NDArray[np.float32], grid: tuple[int, int], width: int) -> Found:
        """Find the nearest vector of each patch of one image.

        Args:
            queries: Patch embeddings (h * w, D).
            grid: Height h and width w of the patch grid. A kind may use it to search for a patch where adjacent patches
                found something.
            width: Width of the search.

        Returns:
            Distances (h * w,) and bank indices (h * w,).
        """
        distances, indices = self.search(queries, 1, width)
        return distances[:, 0], indices[:, 0]

    @abstractmethod
    def _search_block(self, queries: NDArray[np.float32], k: int, width: int) -> Found: ...

    def _search_faiss(self, queries: NDArray[np.float32], k: int, parameters: faiss.SearchParameters | None = None) -> Found:
        """Squared distances (N, k) and bank indices (N, k) by FAISS, in a part of the queries for each thread."""
        search = partial(self.faiss.search, k=k, params=parameters)
        if self.threads.count is None:
            return self.threads.together(search, queries)
        parts = np.array_split(queries, max(1, min(self.threads.count * _PARTS_PER_THREAD, len(queries))))
        found = self.threads.each(search, parts)
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])

    def _sorted(self, queries: NDArray[np.float32], indices: NDArray[np.int64]) -> Found:
        """Distances (N, k) of queries to the vectors of bank indices (N, k), both in ascending order of the distances."""
        distances = exact_distances(queries, self.take(indices))
        if indices.shape[1] == 1:
            return distances, indices
        order = np.argsort(distances, axis=1, kind="stable")
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


class ApproximateIndex(FaissIndex):
    """An index that compares a query with some of the vectors, and may miss the nearest one."""

    @abstractmethod
    def _parameters(self, k: int, width: int) -> faiss.SearchParameters:
        """Make FAISS's parameters for a search of k vectors with a width."""

    def nearest(self, queries: NDArray[np.float32], grid: tuple[int, int], width: int) -> Found:
        """Find the nearest vector of each patch of one image; see :meth:`FaissIndex.nearest`.

        Adjacent patches often have the same nearest vector. So each patch also tries the vectors found for the four patches
        beside it, one side after the other: a vector can travel on. On solar cells, that halves the misses.
        """
        distances, indices = super().nearest(queries, grid, width)
        for axis, step in _ADJACENT_PATCHES:
            adjacent = np.roll(indices.reshape(grid), step, axis).reshape(-1)
            others = np.flatnonzero(adjacent != indices)
            for start in range(0, len(others), BLOCK_ROWS):
                rows = others[start : start + BLOCK_ROWS]
                tried = exact_distances(queries[rows], self.take(adjacent[rows])[:, None])[:, 0]
                nearer = tried < distances[rows]
                distances[rows[nearer]], indices[rows[nearer]] = tried[nearer], adjacent[rows[nearer]]
        return distances, indices

    def _search_block(self, queries: NDArray[np.float32], k: int, width: int) -> Found:
        squares, indices = self._search_faiss(queries, k, self._parameters(k, width))
        distances, missed = np.sqrt(squares), (indices < 0).any(1)
        if missed.any():
            distances[missed], indices[missed] = self._search_all(queries[missed], k)
        return distances, indices

    def _search_all(self, queries: NDArray[np.float32], k: int) -> Found:
        """Find the k nearest vectors of queries for which the index finds fewer than k."""
        return self._sorted(queries, self.threads.together(faiss.knn, queries, self.vectors, k)[1])


def exact_distances(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distances (N, k) of queries (N, D) to vectors (N, k, D)."""
    difference = queries[:, None] - vectors
    return np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))


def plain_storage(index: faiss.Index) -> Storage | None:
    """Storage of a FAISS index that keeps its vectors as a bank does, whatever else it is; None for any other."""
    if index.metric_type != faiss.METRIC_L2:
        return None
    if isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat)):
        return "float32"
    if isinstance(index, (faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer)):
        return _QUANTIZED_STORAGES.get(index.sq.qtype)
    return None


class _Array:
    """The vectors (M, D) inside a flat FAISS index, for NumPy. Keeps ``owner`` alive, to which their memory belongs."""

    def __init__(self, flat: faiss.IndexFlat, owner: faiss.Index) -> None:
        self._owner = owner
        values = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
        self.__array_interface__ = {
            "version": 3,
            "shape": (flat.ntotal, flat.d),
            "typestr": np.dtype(np.float32).str,
            "data": (values.__array_interface__["data"][0], True),  # read-only
        }


def _array(flat: faiss.IndexFlat, owner: faiss.Index) -> NDArray[np.float32]:
    return np.asarray(_Array(flat, owner))
