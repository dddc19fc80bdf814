"""The memory bank: the patch embeddings of a coreset, and nearest-neighbor search in them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.bundle import MAPPED_FILE_BYTES, MAX_WIDTH, read_file
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError
from patchcore_plugin.memory_bank.faiss_index import BLOCK_ROWS, exact_distances
from patchcore_plugin.memory_bank.file import read_bank, write_bank
from patchcore_plugin.memory_bank.indexes import KINDS
from patchcore_plugin.memory_bank.layout import is_finite
from patchcore_plugin.memory_bank.threads import Threads
from patchcore_plugin.scoring.scores import Scores, farthest_patches, image_score, reweight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import FileContent, IndexKind, Storage
    from patchcore_plugin.memory_bank.defects import Defects
    from patchcore_plugin.memory_bank.faiss_index import FaissIndex, Found
    from patchcore_plugin.scoring import ScoreRule

_PAIRWISE_LIMIT = 2**40  # M * M * D up to which each bank vector is compared with every other one
_NEIGHBORS_WIDTH_FACTOR = 4  # width of a search for neighbors, as a multiple of their number

# An approximate search may miss the nearest vector, and an image's score is its largest distance: one miss among a thousand
# patches would be one in every image. So the farthest patches of an image are searched for again, a few at a time.
_SECOND_SEARCH_WIDTH_FACTOR = 8
_SECOND_SEARCH_PATCHES = 2  # at a time
_SECOND_SEARCH_PATCHES_LIMIT = 64  # of an image


class MemoryBank:
    """Normal patch embeddings, searched by Euclidean distance with FAISS.

    Returned distances are exact for the vectors returned, whatever the index: they are computed from the differences between
    a query and the vectors as they are stored. An index other than ``"flat"`` may return a vector that is not the nearest
    one; :func:`patchcore_plugin.memory_bank.choice.choose` measures how often.

    Args:
        vectors: Bank vectors (M, D), finite, cast to float32.
        index: Kind of the index. ``"flat"`` compares each query with every vector. ``"bfloat16"`` does so too, but for the
            patches of images it compares exactly only with the best candidates of a matrix product in bfloat16. ``"ivf"``
            compares with the vectors in the nearest cells of a k-means partition. ``"hnsw"`` follows a graph from vector to
            vector; building it takes 0.05 to 0.5 ms a vector. ``"reduced"`` follows such a graph over the 64 principal
            components of the vectors, and compares exactly with the best candidates that it finds.
        storage: Number format in which the vectors are kept: ``"float32"``, ``"float16"`` (half the memory) or ``"int8"``
            (a quarter; distances change by about a percent). The index ``"bfloat16"`` needs ``"float32"``.
        width: Breadth of an approximate search: number of candidates (bfloat16, up to 16; reduced; hnsw) or of cells (ivf).
            A wider search is slower and misses less. None is the default of the kind.
        num_neighbors: Number of neighbors of each bank vector to find in advance for the image score (equation 7 of the
            paper); 0 finds neighbors when they are needed.

    Attributes:
        neighbors: Bank indices (M, k), int32, of the neighbors found in advance, each vector the first among its own; None
            where there are none.

    Raises:
        UsageError: If ``vectors`` is not a matrix, is empty, or holds NaN or infinite values, or if another argument is out
            of range.

    Example:
        >>> bank = MemoryBank(coreset, index="hnsw")
        >>> distances, indices = bank.search(queries, k=1)
    """

    def __init__(
        self,
        vectors: ArrayLike,
        index: IndexKind = "flat",
        storage: Storage = "float32",
        width: int | None = None,
        num_neighbors: int = 0,
    ) -> None:
        vectors = _as_matrix(vectors, "vectors")
        _check_build(vectors, index, storage)
        self._hold(KINDS[index].build(vectors, storage))
        if width is not None:
            self.width = width
        self.find_neighbors(num_neighbors)

    def _hold(self, index: FaissIndex, neighbors: NDArray[np.int32] | None = None) -> None:
        self._index, self.neighbors, self._width = index, neighbors, index.default_width

    def __len__(self) -> int:
        """Number M of bank vectors."""
        return self._index.faiss.ntotal

    @property
    def dimension(self) -> int:
        """Number D of values of a vector."""
        return self._index.faiss.d

    @property
    def index(self) -> IndexKind:
        """Kind of the index."""
        return self._index.kind

    @property
    def storage(self) -> Storage:
        """Number format in which the vectors are kept."""
        return self._index.storage

    @property
    def width(self) -> int:
        """Breadth of an approximate search; 0 for exact search."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        check_number("width", width, *self._index.width_limits, whole=True, hint=f"The index is {self.index!r}.")
        self._width = int(width)

    @property
    def threads(self) -> int | None:
        """Number of threads that search at the same time; None leaves threads to FAISS, which takes OpenMP's.

        OpenMP's threads keep spinning for a while after a search, and slow down what runs next on their cores. A flat index
        takes them nevertheless, so many of them: its matrix products are several times slower on other threads. The index
        ``"bfloat16"`` takes as many threads of OpenVINO; with None, one thread for each image that is searched at the same
        time.
        """
        return self._index.threads.count

    @threads.setter
    def threads(self, threads: int | None) -> None:
        self._index.threads = Threads(threads)

    def on_threads(self, threads: int | None) -> Self:
        """The same bank, whose vectors are not copied, searched on other threads; see :attr:`threads`."""
        bank = copy.copy(self)
        bank._index = copy.copy(self._index)
        bank.threads = threads
        return bank

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Vectors (M, D) as they are stored, read-only. Float32 vectors are not copied, except from cells (ivf)."""
        return self._index.vectors

    def find_neighbors(self, count: int) -> None:
        """Find the nearest bank vectors of each bank vector in advance, for the image score.

        Each vector is compared with every other one. Where that would take minutes, the index searches instead; a flat index
        so large finds no neighbors in advance.

        Args:
            count: Number of neighbors of a vector, itself among them; 0 forgets the neighbors.
        """
        self.neighbors = None
        count = min(count, len(self))
        pairwise = len(self) ** 2 * self.dimension <= _PAIRWISE_LIMIT
        if count < 1 or (self._index.exhaustive and not pairwise):
            return
        found, vectors = np.empty((len(self), count), np.int32), self.vectors
        for start in range(0, len(self), BLOCK_ROWS):
            rows = vectors[start : start + BLOCK_ROWS]
            if pairwise:
                found[start : start + BLOCK_ROWS] = self._index.threads.together(faiss.knn, rows, vectors, count)[1]
            else:
                found[start : start + BLOCK_ROWS] = self._index.search(rows, count, _NEIGHBORS_WIDTH_FACTOR * count)[1]
        self.neighbors = _own_first(found)

    def search(self, queries: ArrayLike, k: int = 1, width: int | None = None) -> Found:
        """Find the k nearest bank vectors of each query. The indexes ``"flat"`` and ``"bfloat16"`` search exactly.

        Args:
            queries: Patch embeddings (N, D), finite, cast to float32.
            k: Number of vectors to find for each query; at most the size of the bank is used.
            width: Breadth of an approximate search; None is the bank's own.

        Returns:
            Euclidean distances (N, k), float32, in ascending order, and bank indices (N, k), int64.

        Raises:
            UsageError: If the queries' shape does not fit the bank, they hold NaN or infinity, or ``k`` is below 1.
        """
        queries = self._as_queries(queries)
        check_number("k", k, 1, whole=True)
        return self._index.search(queries, min(k, len(self)), self._width if width is None else min(width, MAX_WIDTH))

    def nearest(self, embedding: NDArray[np.float32]) -> Found:
        """Find the nearest bank vector of each patch of images.

        With an approximate index, this misses less than :meth:`search`, as adjacent patches help each other.

        Args:
            embedding: Patch embeddings (B, h, w, D), float32.

        Returns:
            Euclidean distances (B * h * w,), float32, and bank indices (B * h * w,), int64.

        Raises:
            UsageError: If the embedding does not fit the bank, or holds NaN or infinity.
        """
        return self._nearest(self._as_queries(embedding.reshape(-1, embedding.shape[-1])), embedding.shape[1:3])

    def score(self, embedding: NDArray[np.float32], rule: ScoreRule, defects: Defects | None = None) -> Scores:
        """Score images by their patch embeddings.

        Args:
            embedding: Patch embeddings (B, h, w, D), float32.
            rule: How patch distances become an image score.
            defects: Known defects, which raise the scores of what resembles them.

        Raises:
            UsageError: If the embedding does not fit the bank, or holds NaN or infinity.
        """
        inspected = rule.inspected(embedding)
        distances, indices = self.find(inspected)
        rows = farthest_patches(distances)
        queries = inspected.reshape(-1, self.dimension)[rows]
        support = self.support(queries, indices.reshape(-1)[rows], rule.num_neighbors)
        if defects is not None:
            distances = defects.raise_distances(inspected, distances)
        patch = rule.on_grid(distances, embedding.shape[1:3])
        return Scores(reweight(image_score(patch, rule), support), patch)

    def find(self, embedding: NDArray[np.float32]) -> Found:
        """Find the nearest bank vector of each patch of images, and search more widely for an image's farthest patches.

        Args:
            embedding: Patch embeddings (B, h, w, D), float32.

        Returns:
            Euclidean distances (B, h, w), float32, and bank indices (B, h, w), int64.

        Raises:
            UsageError: If the embedding does not fit the bank, or holds NaN or infinity.
        """
        images, height, width, dimension = embedding.shape
        queries = self._as_queries(embedding.reshape(-1, dimension))
        distances, indices = self._nearest(queries, (height, width))
        if self._width:
            for image in _images(len(queries), height * width):
                distances[image], indices[image] = self._farthest_again(queries[image], distances[image], indices[image])
        return distances.reshape(images, height, width), indices.reshape(images, height, width)

    def search_again(self, queries: NDArray[np.float32], factor: int) -> Found:
        """Find the nearest bank vector of a few patches, by a wider search than for a score.

        Args:
            queries: Patch embeddings (N, D), float32.
            factor: Width of an approximate search, as a multiple of the bank's own.

        Returns:
            Distances (N,), float32, and bank indices (N,), int64.
        """
        distances, indices = self.search(queries, 1, max(1, factor * self._width))
        return distances[:, 0], indices[:, 0]

    @property
    def members(self) -> list[MemoryBank]:
        """The bank itself, as the only one of a model that is no ensemble."""
        return [self]

    @property
    def weights(self) -> list[float]:
        """Weight of the only member."""
        return [1]

    def split(self, embedding: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The embedding itself; see :meth:`EnsembleBank.split`."""
        return [embedding]

    def support(self, queries: NDArray[np.float32], indices: NDArray[np.int64], num_neighbors: int) -> NDArray[np.float32]:
        """Distances of patches to the neighborhoods of their nearest bank vectors, for equation 7 of the paper.

        Args:
            queries: Patch embeddings (B, D), float32.
            indices: Bank index of the nearest vector of each patch (B,).
            num_neighbors: Size of a neighborhood; at most the size of the bank is used.

        Returns:
            Distances (B, num_neighbors), float32, the first that to the nearest vector itself.
        """
        count = min(num_neighbors, len(self))
        if self.neighbors is not None and count <= self.neighbors.shape[1]:
            around = self.neighbors[indices, :count]
        else:
            width = max(self._width, _NEIGHBORS_WIDTH_FACTOR * count)
            around = self._index.search(self._index.take(indices), count, width)[1]
            around[:, 0] = indices  # a duplicate of the vector may have been found first
        return exact_distances(queries, self._index.take(around))

    def save(self, path: str | Path) -> None:
        """Write the bank as a FAISS index, and its neighbors beside it (``.npy``) where there are some.

        The width is not written, nor is the kind ``"bfloat16"``, whose file is that of a flat index.
        """
        write_bank(Path(path), self._index.faiss, self.neighbors)

    @classmethod
    def load(cls, path: str | Path, index: IndexKind | None = None, mapped_from: int = MAPPED_FILE_BYTES) -> Self:
        """Read a bank that :meth:`save` wrote, with its neighbors if there is such a file.

        Args:
            path: File of the index.
            index: Kind of the index; None takes the kind that the file shows, and ``"flat"`` for ``"bfloat16"``.
            mapped_from: Size, in bytes, from which the file is mapped into memory instead of read.
            neighbors: Whether to read the file of neighbors too, where there is one.

        Raises:
            FileNotFoundError: If there is no such file.
            UsageError: If the file is not an L2 FAISS index of this kind or does not hold finite vectors, or if the file
                beside it does not hold their neighbors.
            BundleError: If a file is not a regular one, or the file of neighbors is damaged.
        """
        path = Path(path)
        beside = path.with_suffix(".npy")
        neighbors = read_file(beside) if beside.exists() else None
        return cls.from_content(read_file(path, mapped_from=mapped_from), neighbors, index)

    @classmethod
    def from_content(cls, file: FileContent, neighbors: FileContent | None = None, index: IndexKind | None = None) -> Self:
        """Make the bank that :meth:`save` wrote from the content of its files.

        Args:
            file: Content of the file of the index.
            neighbors: Content of the file of neighbors; None without one.
            index: Kind of the index, as for :meth:`load`.

        Raises:
            UsageError: As of :meth:`load`.
            BundleError: If the file of neighbors is damaged.
        """
        bank = cls.__new__(cls)
        bank._hold(*read_bank(file, neighbors, index))
        return bank

    def _as_queries(self, values: ArrayLike) -> NDArray[np.float32]:
        queries = _as_matrix(values, "queries")
        if queries.shape[1] != self.dimension:
            msg = f"queries have {queries.shape[1]} values each, the memory bank's vectors {self.dimension}."
            raise UsageError(msg)
        return queries

    def _nearest(self, queries: NDArray[np.float32], grid: tuple[int, int]) -> Found:
        """See :meth:`nearest`. Images are searched one by one, so that an answer does not depend on the others."""
        distances, indices = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
        for image in _images(len(queries), grid[0] * grid[1]):
            distances[image], indices[image] = self._index.nearest(queries[image], grid, self._width)
        return distances, indices

    def _farthest_again(
        self, queries: NDArray[np.float32], distances: NDArray[np.float32], indices: NDArray[np.int64]
    ) -> Found:
        """Search again, more widely, for the farthest patches of one image, until no other patch can be farther.

        Args:
            queries: Patch embeddings (h * w, D).
            distances: Distance of each patch to the vector found for it (h * w,).
            indices: Bank index of the vector found for each patch (h * w,).

        Returns:
            Distances and bank indices, with the nearer vectors that the second search found.
        """
        distances, indices = distances.copy(), indices.copy()
        width = min(_SECOND_SEARCH_WIDTH_FACTOR * self._width, MAX_WIDTH)
        order, largest = np.argsort(-distances, kind="stable")[:_SECOND_SEARCH_PATCHES_LIMIT], -np.inf
        for start in range(0, len(order), _SECOND_SEARCH_PATCHES):
            rows = order[start : start + _SECOND_SEARCH_PATCHES]
            if largest >= distances[rows[0]]:  # a missed vector is nearer than the one found: no distance can grow
                break
            again, found = (part[:, 0] for part in self._index.search(queries[rows], 1, width))
            nearer = again < distances[rows]
            distances[rows[nearer]], indices[rows[nearer]] = again[nearer], found[nearer]
            largest = max(largest, distances[rows].max())
        return distances, indices


def _check_build(vectors: NDArray[np.float32], index: str, storage: str) -> None:
    if not len(vectors):
        msg = "The memory bank is empty: it needs at least one patch embedding."
        raise UsageError(msg)
    if index not in KINDS:
        msg = f"index must be one of {', '.join(KINDS)}; got {index!r}."
        raise UsageError(msg)
    storages = KINDS[index].storages
    if storage not in storages:
        msg = f"storage must be one of {', '.join(storages)} for the index {index!r}; got {storage!r}."
        raise UsageError(msg)
    if storage == "float16" and np.abs(vectors).max() > np.finfo(np.float16).max:
        msg = "The vectors hold values too large for storage 'float16': use 'float32'."
        raise UsageError(msg)


def _as_matrix(values: ArrayLike, name: str) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2 or not matrix.shape[1]:
        msg = f"{name} must be a matrix (N, D), got shape {matrix.shape}."
        raise UsageError(msg)
    if not is_finite(matrix):
        msg = f"{name} hold NaN or infinite values, or values too large for float32 distances."
        raise UsageError(msg)
    return matrix


def _images(patches: int, patches_per_image: int) -> Iterator[slice]:
    """The rows of each image among the patches of all images."""
    return (slice(start, start + patches_per_image) for start in range(0, patches, patches_per_image))


def _own_first(found: NDArray[np.int32]) -> NDArray[np.int32]:
    """Neighbors (M, k) with each vector moved to the first place of its own row.

    A duplicate is as near as the vector itself, and an approximate search may have missed the vector: then the vector takes
    the place of the farthest neighbor.
    """
    own = np.arange(len(found), dtype=np.int32)
    same = found == own[:, None]
    place = np.where(same.any(1), same.argmax(1), found.shape[1] - 1)
    ordered = found.copy()
    ordered[own, place] = found[:, 0]
    ordered[:, 0] = own
    return ordered
