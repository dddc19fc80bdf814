"""The memory bank: the coreset's patch embeddings and exact nearest-neighbour search in them, on FAISS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.scoring import Scores, score

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BLOCK_ROWS = 4096
_LARGEST = 1e16  # the sum of a few thousand such squares still is a float32


class MemoryBank:
    """Bank of normal patch embeddings, searched by Euclidean distance (FAISS, flat).

    FAISS finds the neighbours; their distances are then taken again by differences, because its blocked search expands
    ``|x - y|^2`` and loses digits where a patch lies close to the bank.

    Args:
        vectors: Bank vectors (M, D), finite, cast to float32.

    Raises:
        ValueError: If ``vectors`` is no matrix, is empty, or holds NaN or infinite values.

    Example:
        >>> bank = MemoryBank(coreset)
        >>> distances, indices = bank.search(queries, k=1)
    """

    def __init__(self, vectors: ArrayLike) -> None:
        vectors = _as_matrix(vectors, "vectors")
        if not len(vectors):
            msg = "The memory bank is empty: it needs at least one patch embedding."
            raise ValueError(msg)
        index = faiss.IndexFlatL2(vectors.shape[1])
        index.add(vectors)
        self._adopt(index)

    def _adopt(self, index: faiss.IndexFlat) -> None:
        self._index = index
        self.vectors = np.asarray(_Storage(index))

    def __len__(self) -> int:
        """Number M of bank vectors."""
        return self._index.ntotal

    @property
    def dimension(self) -> int:
        """Number D of values of an embedding."""
        return self._index.d

    def search(self, queries: ArrayLike, k: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k nearest bank vectors of each query.

        Args:
            queries: Patch embeddings (N, D), finite, cast to float32.
            k: Number of neighbours; at most as many as the bank has are returned.

        Returns:
            Euclidean distances (N, k), float32, ascending, and bank indices (N, k), int64.

        Raises:
            ValueError: If the queries' shape does not fit the bank, they hold NaN or infinity, or ``k`` is below 1.
        """
        queries = _as_matrix(queries, "queries")
        if queries.shape[1] != self.dimension:
            msg = f"queries have {queries.shape[1]} values each, the memory bank's vectors {self.dimension}."
            raise ValueError(msg)
        if k < 1:
            msg = f"k must be at least 1, got {k}."
            raise ValueError(msg)
        k = min(k, len(self))
        distances = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            _, found = self._index.search(queries[rows], k)
            difference = queries[rows, None] - self.vectors[found]
            exact = np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))
            order = np.argsort(exact, axis=1, kind="stable")
            distances[rows] = np.take_along_axis(exact, order, axis=1)
            indices[rows] = np.take_along_axis(found, order, axis=1)
        return distances, indices

    def score(self, embedding: NDArray[np.float32], num_neighbors: int) -> Scores:
        """Score embeddings (B, h, w, D); see :func:`patchcore_plugin.scoring.score`."""
        return score(embedding, self.vectors, self.search, num_neighbors)

    def save(self, path: str | Path) -> None:
        """Write the bank as a FAISS index file."""
        Path(path).write_bytes(faiss.serialize_index(self._index).tobytes())

    @classmethod
    def load(cls, path: str | Path) -> MemoryBank:
        """Read a bank that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no flat L2 FAISS index, or holds no finite vectors.
        """
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        try:
            index = faiss.deserialize_index(data)
        except (RuntimeError, MemoryError) as error:
            msg = f"{path} is not a readable FAISS index (truncated or damaged)."
            raise ValueError(msg) from error
        if not (isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_L2):
            msg = f"{path} holds a {type(index).__name__}; a memory bank is a flat L2 index."
            raise ValueError(msg)
        bank = cls.__new__(cls)
        if not index.ntotal:
            msg = f"{path} holds an empty memory bank."
            raise ValueError(msg)
        bank._adopt(index)
        if not (np.abs(bank.vectors) < _LARGEST).all():
            msg = f"{path} holds NaN or infinite values, or values too large for float32 distances."
            raise ValueError(msg)
        return bank


class _Storage:
    """The vectors (M, D) inside a FAISS index as an array, so that the bank is held once. Keeps the index alive."""

    def __init__(self, index: faiss.IndexFlat) -> None:
        self._index = index
        flat = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
        address = flat.__array_interface__["data"][0]
        self.__array_interface__ = {
            "version": 3,
            "shape": (index.ntotal, index.d),
            "typestr": np.dtype(np.float32).str,
            "data": (address, True),  # read only
        }


def _as_matrix(values: ArrayLike, name: str) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2 or not matrix.shape[1]:
        msg = f"{name} must be a matrix (N, D), got shape {matrix.shape}."
        raise ValueError(msg)
    if not (np.abs(matrix) < _LARGEST).all():
        msg = f"{name} hold NaN or infinite values, or values too large for float32 distances."
        raise ValueError(msg)
    return matrix
