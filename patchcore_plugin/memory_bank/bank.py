"""The memory bank: the coreset's patch embeddings and nearest-neighbour search in them, on FAISS."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, get_args

import faiss
import numpy as np

from patchcore_plugin.bundle import MAX_WIDTH, IndexKind, Storage
from patchcore_plugin.memory_bank import file as bank_file
from patchcore_plugin.memory_bank import indexes as bank_faiss
from patchcore_plugin.memory_bank.bfloat16 import PARTS, Product
from patchcore_plugin.scoring.scores import Scores, farthest_patches, image_score, reweight

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from patchcore_plugin.scoring import ScoreRule

DEFAULT_WIDTH = {"flat": 0, "ivf": 16, "hnsw": 32}
"""Width of the search where none is given: none (flat), lists probed (ivf), or length of the candidate list (hnsw)."""

_BLOCK_ROWS = 4096
_EXACT_NEIGHBOURS = 2**40  # M * M * D up to which the bank's own neighbours are searched one by one
_PARTS = 2  # of the queries for each thread, as some take longer
# An approximate search may overlook the nearest vector, and an image's score is its largest distance: one slip in a
# thousand patches would be one in every image. So the patches of largest distance are searched again, this many times wider.
_AGAIN, _WIDER, _MOST_AGAIN = 2, 8, 64
# Adjacent patches are often nearest to the same vector: what an approximate search has overlooked for one, it has often
# found for the next. Axis of (h, w) and step to the four around each patch, in turn, so that an answer travels.
_AROUND = ((0, 1), (0, -1), (1, 1), (1, -1))
_FEW = 16  # queries, up to which FAISS's flat search takes differences


class MemoryBank:
    """Bank of normal patch embeddings, searched by Euclidean distance (FAISS).

    Whatever the index, a distance that is returned is exact: it is taken by differences between the query and the vector
    as it is stored. An approximate index (``"ivf"``, ``"hnsw"``, or ``"flat"`` with a width) may miss the nearest vector of
    a patch and return one a little farther; :func:`patchcore_plugin.memory_bank.choice.choose` measures how often.

    Args:
        vectors: Bank vectors (M, D), finite, cast to float32.
        index: ``"flat"`` compares with every vector; ``"ivf"`` with those of the nearest cells of a k-means partition;
            ``"hnsw"`` follows a graph of neighbours, whose building takes 0.05 to 0.5 ms a vector.
        storage: Precision in which vectors are kept: ``"float32"``, ``"float16"`` (half the memory) or ``"int8"`` (a
            quarter; distances move by about a percent).
        width: Breadth of an approximate search: cells probed (ivf), candidates kept (hnsw), or, for the patches of images,
            candidates that a product in bfloat16 gives (flat in float32, up to 16; 0 is exact search). More is slower and
            finds more.
        num_neighbors: Neighbours of each bank vector that are found in advance for the image score (equation 7); 0 finds
            them when they are needed.

    Raises:
        ValueError: If ``vectors`` is no matrix, is empty, or holds NaN or infinite values, or another argument is none of
            those above.

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
        if not len(vectors):
            msg = "The memory bank is empty: it needs at least one patch embedding."
            raise ValueError(msg)
        if storage not in get_args(Storage):
            msg = f"storage must be one of {', '.join(get_args(Storage))}; got {storage!r}."
            raise ValueError(msg)
        _check_storage(vectors, storage)
        built = bank_faiss.build(vectors, index, storage)
        built.train(vectors)
        built.add(vectors)
        if isinstance(built, faiss.IndexIVF):
            built.make_direct_map()  # from a number to its vector
        self._adopt(built)
        if width is not None:
            self.width = width
        self.find_neighbors(num_neighbors)

    def _adopt(self, index: faiss.Index, *, mapped: bool = False) -> None:
        self._index, self._mapped = index, mapped
        self.index: IndexKind = bank_file.kind(index)
        storage = bank_file.storage(index)
        self.storage: Storage = bank_file.STORAGES[storage.sq.qtype] if hasattr(storage, "sq") else "float32"
        self._width = DEFAULT_WIDTH[self.index]
        self.neighbors: NDArray[np.int32] | None = None
        self._threads: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._product: Product | None = None
        self._lock = Lock()  # of the product's making

    def __len__(self) -> int:
        """Number M of bank vectors."""
        return self._index.ntotal

    @property
    def dimension(self) -> int:
        """Number D of values of an embedding."""
        return self._index.d

    @property
    def width(self) -> int:
        """Breadth of an approximate search; 0 for exact search."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        least, most = (1, MAX_WIDTH) if self.index != "flat" else (0, PARTS if self.storage == "float32" else 0)
        if not least <= width <= most:
            msg = f"width must be from {least} to {most:,} for the index {self.index!r} in {self.storage}, got {width}."
            raise ValueError(msg)
        self._width, self._product = int(width), None

    @property
    def threads(self) -> int | None:
        """Threads of the bank's own to search one image with; None leaves it to FAISS, which uses OpenMP's.

        OpenMP's threads go on spinning for a while when a search is over, and slow what runs next on their cores. Exact
        search leaves it to FAISS nevertheless: its matrix products are several times slower on threads of ours. A flat bank
        with a width takes as many of OpenVINO's; with None, one for each image that is searched at the same time.
        """
        return self._threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._threads, self._product = threads, None
        self._pool = threads and ThreadPoolExecutor(
            threads, thread_name_prefix="memory-bank", initializer=faiss.omp_set_num_threads, initargs=(1,)
        )

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The vectors (M, D) as they are stored, read-only; no copy where they are float32 and not in cells."""
        if self.storage == "float32" and self.index != "ivf":
            return bank_faiss.view(self._index)
        vectors = self._index.reconstruct_n(0, len(self))
        vectors.setflags(write=False)
        return vectors

    def add(self, vectors: ArrayLike) -> None:
        """Add vectors (N, D) to the bank. Not while another thread searches.

        With storage ``"int8"``, values beyond the range of the first vectors are cut off.

        Raises:
            ValueError: If their shape does not fit the bank, they hold NaN or infinite values, or the bank's file is so
                large that it was mapped into memory.
        """
        if self._mapped:
            msg = "A memory bank that is mapped into memory cannot grow."
            raise ValueError(msg)
        vectors = self._fitting(vectors, "vectors")
        _check_storage(vectors, self.storage)
        grown = faiss.clone_index(self._index)  # arrays that look into the old one stay as they are
        grown.add(vectors)
        self._index, self._product = grown, None
        self.find_neighbors(0 if self.neighbors is None else self.neighbors.shape[1])

    def find_neighbors(self, count: int) -> None:
        """Find the ``count`` nearest bank vectors of each bank vector, itself among them, for the image score.

        Every vector is compared with every other, or, where that would take minutes, searched for; a flat bank so large
        is left without, and finds them when they are needed.
        """
        self.neighbors = None
        count = min(count, len(self))
        if count < 1:
            return
        found = np.empty((len(self), count), np.int32)
        exact = len(self) ** 2 * self.dimension <= _EXACT_NEIGHBOURS
        if self.index == "flat" and not exact:
            return
        vectors = self.vectors
        for start in range(0, len(self), _BLOCK_ROWS):
            rows = vectors[start : start + _BLOCK_ROWS]
            part = faiss.knn(rows, vectors, count)[1] if exact else self._find(rows, count, 4 * count)[1]
            found[start : start + _BLOCK_ROWS] = part
        # A neighbourhood begins with the vector itself; a duplicate is as near, and a search may have missed it.
        own = np.arange(len(self), dtype=np.int32)
        place = np.where((found == own[:, None]).any(1), (found == own[:, None]).argmax(1), count - 1)
        found[own, place] = found[:, 0]
        found[:, 0] = own
        self.neighbors = found

    def search(
        self, queries: ArrayLike, k: int = 1, width: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k nearest bank vectors of each query.

        Args:
            queries: Patch embeddings (N, D), finite, cast to float32.
            k: Number of neighbours; at most as many as the bank has are returned.
            width: Breadth of an approximate search, for this time; the bank's own if not given. A flat bank is searched
                exactly.

        Returns:
            Euclidean distances (N, k), float32, ascending, and bank indices (N, k), int64.

        Raises:
            ValueError: If the queries' shape does not fit the bank, they hold NaN or infinity, or ``k`` is below 1.
        """
        queries = self._fitting(queries, "queries")
        if k < 1:
            msg = f"k must be at least 1, got {k}."
            raise ValueError(msg)
        return self._search(queries, min(k, len(self)), self._width if width is None else min(width, MAX_WIDTH))

    def nearest(self, embedding: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest bank vector of each patch of images.

        A flat bank with a width compares with the candidates of a product. A graph or cells are searched as
        :meth:`search` does; then each patch also tries the answers of the four around it, which overlooks fewer nearest
        vectors: half as many on solar cells.

        Args:
            embedding: Patch embeddings (B, h, w, D).

        Returns:
            Euclidean distances (B * h * w,), float32, and bank indices (B * h * w,), int64.
        """
        queries = self._fitting(embedding.reshape(-1, embedding.shape[-1]), "queries")
        by_product = self.index == "flat" and self._width > 0
        if by_product:
            distances, indices = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
        else:
            distances, indices = (found[:, 0] for found in self._search(queries, 1, self._width))
        patches = embedding.shape[1] * embedding.shape[2]
        for start in range(0, len(queries), patches):
            image = slice(start, start + patches)
            if by_product:
                distances[image], indices[image] = self._by_product(queries[image])
            elif self.index != "flat":
                self._look_around(queries[image], distances[image], indices[image], embedding.shape[1:3])
        return distances, indices

    def score(self, embedding: NDArray[np.float32], rule: ScoreRule) -> Scores:
        """Score images by their patch embeddings.

        With an approximate index, an image's patches of largest distance are searched for again, more widely, until no
        other can be the farthest; 64 of them at most.

        Args:
            embedding: Patch embeddings (B, h, w, D), float32.
            rule: How patch distances become an image score.
        """
        images, height, width, _ = embedding.shape
        queries = self._fitting(embedding.reshape(-1, embedding.shape[-1]), "queries")
        distances, indices = self.nearest(embedding)
        if self._width:
            for rows in np.split(np.arange(len(queries)), images):
                part = slice(rows[0], rows[-1] + 1)
                self._look_again(queries[part], distances[part], indices[part])
        patch = distances.reshape(images, height, width)
        rows = farthest_patches(patch)
        support = self.support(queries[rows], indices[rows], rule.num_neighbors)
        return Scores(reweight(image_score(patch, rule), support), patch)

    def support(self, queries: NDArray[np.float32], indices: NDArray[np.int64], num_neighbors: int) -> NDArray[np.float32]:
        """Distances of patches to the neighborhoods of their nearest bank vectors, for equation 7.

        Args:
            queries: Patch embeddings (B, D).
            indices: Index of the bank vector nearest to each (B,).
            num_neighbors: Size of a neighborhood; at most the size of the bank is used.

        Returns:
            Distances (B, num_neighbors), float32; the first is that to the nearest vector itself.
        """
        count = min(num_neighbors, len(self))
        if self.neighbors is not None and count <= self.neighbors.shape[1]:
            around = self.neighbors[indices, :count]
        else:
            around = self._search(self._take(indices), count, max(self._width, 4 * count))[1]
            around[:, 0] = indices  # or a duplicate
        return _exact(queries, self._take(around))

    def save(self, path: str | Path) -> None:
        """Write the bank as a FAISS index file, and the neighbours beside it (``.npy``), where there are some."""
        bank_file.write(Path(path), self._index, self.neighbors)

    @classmethod
    def load(cls, path: str | Path) -> MemoryBank:
        """Read a bank that :meth:`save` wrote; its width is not in the file. A large one is mapped into memory.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no L2 FAISS index of a kind that :class:`MemoryBank` builds, or holds no finite
                vectors; or if the neighbours beside it are damaged.
        """
        index, mapped, neighbors = bank_file.read(Path(path))
        bank = cls.__new__(cls)
        bank._adopt(index, mapped=mapped)
        bank.neighbors = neighbors
        return bank

    def _fitting(self, values: ArrayLike, name: str) -> NDArray[np.float32]:
        matrix = _as_matrix(values, name)
        if matrix.shape[1] != self.dimension:
            msg = f"{name} have {matrix.shape[1]} values each, the memory bank's vectors {self.dimension}."
            raise ValueError(msg)
        return matrix

    def _take(self, indices: NDArray) -> NDArray[np.float32]:
        """Vectors (..., D) of bank indices (...)."""
        if self.storage == "float32" and self.index != "ivf":
            return self.vectors[indices]
        flat = np.ascontiguousarray(indices.reshape(-1), np.int64)
        take = self._index.reconstruct_batch  # by OpenMP's threads, but for a pool's one
        vectors = take(flat) if self._pool is None else self._pool.submit(take, flat).result()
        return vectors.reshape(*indices.shape, self.dimension)

    def _by_product(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances (N,) and bank indices (N,) of the nearest of the candidates that a product gives."""
        with self._lock:
            product = self._product = self._product or Product(self.vectors, self._width, self._threads)
        candidates = product.candidates(queries)
        exact = _exact(queries, self._take(candidates))
        best = exact.argmin(1)[:, None]
        return np.take_along_axis(exact, best, 1)[:, 0], np.take_along_axis(candidates, best, 1)[:, 0]

    def _look_around(
        self,
        queries: NDArray[np.float32],
        distances: NDArray[np.float32],
        indices: NDArray[np.int64],
        grid: tuple[int, int],
    ) -> None:
        """Try, in place, for each patch of an image, the answers of the four around it."""
        for axis, step in _AROUND:
            there = np.roll(indices.reshape(grid), step, axis).reshape(-1)
            rows = np.flatnonzero(there != indices)
            tried = _exact(queries[rows], self._take(there[rows])[:, None])[:, 0]
            nearer = tried < distances[rows]
            distances[rows[nearer]], indices[rows[nearer]] = tried[nearer], there[rows[nearer]]

    def _find(
        self, queries: NDArray[np.float32], k: int, width: int
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
        """Indices (N, k) of the vectors that the index finds, and their squared distances, where it has exact ones."""
        if self.index == "flat" and len(queries) <= _FEW:
            return self._on_threads(queries, k, None)
        if self.index == "flat":
            # Its blocked search expands |x - y|^2 and loses digits where a patch lies close to the bank. It is one matrix
            # product after the other, which has its own threads.
            return None, self._index.search(queries, k)[1]
        parameters = (
            faiss.SearchParametersIVF(nprobe=min(width, self._index.nlist))
            if self.index == "ivf"
            else faiss.SearchParametersHNSW(efSearch=max(width, k))
        )
        squares, found = self._on_threads(queries, k, parameters)
        missed = (found < 0).any(1)  # too few vectors in the cells probed, or out of the graph's reach
        if missed.any() and self.index == "ivf":
            all_cells = faiss.SearchParametersIVF(nprobe=self._index.nlist)
            squares[missed], found[missed] = self._index.search(queries[missed], k, params=all_cells)
        elif missed.any():
            found[missed] = faiss.knn(queries[missed], self.vectors, k)[1]
            return None, found
        return squares, found

    def _on_threads(
        self, queries: NDArray[np.float32], k: int, parameters: faiss.SearchParameters | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """FAISS's search, on this bank's own threads if it has some."""
        if self._pool is None:
            return self._index.search(queries, k, params=parameters)
        parts = np.array_split(queries, max(1, min(self.threads * _PARTS, len(queries))))
        found = list(self._pool.map(lambda part: self._index.search(part, k, params=parameters), parts))
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])

    def _search(self, queries: NDArray[np.float32], k: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        distances = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            squares, found = self._find(queries[rows], k, width)
            if squares is None:
                exact = _exact(queries[rows], self._take(found))
                if k > 1:
                    order = np.argsort(exact, axis=1, kind="stable")
                    exact, found = np.take_along_axis(exact, order, axis=1), np.take_along_axis(found, order, axis=1)
            else:
                exact = np.sqrt(squares)
            distances[rows], indices[rows] = exact, found
        return distances, indices

    def _look_again(self, queries: NDArray[np.float32], distances: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
        """Search again for one image's farthest patches, in place, until none of the others can be farther."""
        order = np.argsort(-distances, kind="stable")[: _MOST_AGAIN + 1]
        largest = -np.inf
        for start in range(0, min(len(order), _MOST_AGAIN), _AGAIN):
            rows = order[start : start + _AGAIN]
            if largest >= distances[rows[0]]:  # an approximate distance is never too small
                return
            again, found = (part[:, 0] for part in self._search(queries[rows], 1, min(_WIDER * self._width, MAX_WIDTH)))
            nearer = again < distances[rows]
            distances[rows[nearer]], indices[rows[nearer]] = again[nearer], found[nearer]
            largest = max(largest, distances[rows].max())


def _check_storage(vectors: NDArray[np.float32], storage: str) -> None:
    if storage == "float16" and np.abs(vectors).max(initial=0) > np.finfo(np.float16).max:
        msg = "The vectors hold values too large for storage 'float16': use 'float32'."
        raise ValueError(msg)


def _exact(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distances (N, k) of queries (N, D) to vectors (N, k, D)."""
    difference = queries[:, None] - vectors
    return np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))


def _as_matrix(values: ArrayLike, name: str) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(values, dtype=np.float32)
    if matrix.ndim != 2 or not matrix.shape[1]:
        msg = f"{name} must be a matrix (N, D), got shape {matrix.shape}."
        raise ValueError(msg)
    if not (np.abs(matrix) < bank_file.LARGEST).all():
        msg = f"{name} hold NaN or infinite values, or values too large for float32 distances."
        raise ValueError(msg)
    return matrix
