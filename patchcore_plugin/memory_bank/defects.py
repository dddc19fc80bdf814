"""Known defects: vectors of a second, small bank, near which a patch counts as more anomalous.

A patch at distance ``d`` from the memory bank and ``e`` from the nearest known defect gets ``d + 0.5 max(0, d - e)``: only a
patch that resembles a defect more than anything normal is raised, the more the clearer. No distance and no score falls.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.bundle import DEFECTS, BundleError, parse_array
from patchcore_plugin.errors import writing
from patchcore_plugin.memory_bank.faiss_index import exact_distances
from patchcore_plugin.memory_bank.threads import Threads
from patchcore_plugin.scoring.scores import weighted_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import BundleContent, Member

MAX_DEFECTS = 2000
"""Most vectors of known defects."""

_SHARE = 0.5  # of the difference, by which a distance is raised


class Defects:
    """Vectors of known defects.

    Args:
        vectors: Patch embeddings (K, D), float32.
        members: Members of the model: their values in an embedding, and the weights of their distances.
        threads: Number of threads to search with; None leaves them to FAISS.

    Attributes:
        vectors: The vectors.
    """

    def __init__(self, vectors: NDArray[np.float32], members: Sequence[Member], threads: int | None = None) -> None:
        self.vectors = vectors
        self._ends = np.cumsum([member.embedding_dimension for member in members])[:-1]
        self._weights = [member.weight for member in members]
        self._parts, self._threads = self._split(vectors), Threads(threads)

    def on_threads(self, threads: int | None) -> Defects:
        """The same defects, searched for on other threads."""
        defects = copy.copy(self)
        defects._threads = Threads(threads)
        return defects

    def raise_distances(self, embedding: NDArray[np.float32], distances: NDArray[np.float32]) -> NDArray[np.float32]:
        """The distances of patches, higher where a patch is nearer to a known defect than to the memory bank.

        Args:
            embedding: Patch embeddings (..., D), float32.
            distances: Distance of each patch to the memory bank (...), float32.
        """
        found = []
        for queries, vectors in zip(self._split(embedding.reshape(-1, embedding.shape[-1])), self._parts, strict=True):
            _, nearest = self._threads.together(faiss.knn, queries, vectors, 1)
            found.append(exact_distances(queries, vectors[nearest])[:, 0])
        difference = distances - weighted_mean(found, self._weights).reshape(distances.shape)
        return distances + np.float32(_SHARE) * np.maximum(difference, 0)

    def _split(self, embeddings: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return [np.ascontiguousarray(part) for part in np.split(embeddings, self._ends, axis=-1)]


def read_defects(bundle: BundleContent) -> Defects | None:
    """Read the known defects of a bundle; None where it has none.

    Args:
        bundle: Content of the bundle.

    Raises:
        BundleError: If the file is damaged or does not fit the memory bank.
    """
    file, values = bundle.files.get(DEFECTS), bundle.manifest.values
    if file is None:
        return None
    vectors = parse_array(file)
    fits = vectors.dtype == np.float32 and vectors.ndim == 2 and vectors.shape[1] == values
    if not fits or not 0 < len(vectors) <= MAX_DEFECTS or not np.isfinite(vectors).all():
        msg = (
            f"{file.path} holds {vectors.dtype} values of shape {vectors.shape}, expected finite float32 values of shape "
            f"(1 to {MAX_DEFECTS}, {values})."
        )
        raise BundleError(msg)
    return Defects(np.ascontiguousarray(vectors), bundle.manifest.all_members)


def write_defects(vectors: NDArray[np.float32], folder: Path) -> None:
    """Write vectors of known defects (K, D) into the folder of a bundle."""
    with writing(folder / DEFECTS):
        np.save(folder / DEFECTS, np.ascontiguousarray(vectors, np.float32))
