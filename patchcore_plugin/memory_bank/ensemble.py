"""The memory banks of an ensemble, searched as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import BANKS
from patchcore_plugin.errors import UsageError
from patchcore_plugin.scoring.scores import Scores, farthest_patches, image_score, reweight, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.memory_bank.bank import MemoryBank
    from patchcore_plugin.memory_bank.defects import Defects
    from patchcore_plugin.memory_bank.faiss_index import Found
    from patchcore_plugin.scoring import ScoreRule


class EnsembleBank:
    """The memory banks of an ensemble's members.

    An embedding holds the values of all members, one after the other. Each member searches its own values in its own bank,
    and a patch's distance is the mean of the members' distances, each multiplied by the member's weight.

    Vectors are numbered through all banks, member by member.

    Args:
        members: The banks.
        weights: Weight of each member's distances; the first is 1.
    """

    def __init__(self, members: Sequence[MemoryBank], weights: Sequence[float]) -> None:
        self.members = list(members)
        self.weights = list(weights)
        self._starts = np.cumsum([0, *map(len, members)])[:-1]

    def __len__(self) -> int:
        """Number of vectors of all banks."""
        return sum(map(len, self.members))

    @property
    def dimension(self) -> int:
        """Number of values of an embedding."""
        return sum(bank.dimension for bank in self.members)

    @property
    def threads(self) -> int | None:
        """Number of threads that search at the same time; see :attr:`MemoryBank.threads`."""
        return self.members[0].threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        for bank in self.members:
            bank.threads = threads

    def on_threads(self, threads: int | None) -> EnsembleBank:
        """The same banks, searched on other threads; see :meth:`MemoryBank.on_threads`."""
        return EnsembleBank([bank.on_threads(threads) for bank in self.members], self.weights)

    def split(self, embedding: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Values (..., D) of each member, contiguous, in embeddings (..., D) of all.

        Raises:
            UsageError: If the embeddings have another number of values.
        """
        if embedding.shape[-1] != self.dimension:
            msg = f"queries have {embedding.shape[-1]} values each, the vectors of the memory banks {self.dimension}."
            raise UsageError(msg)
        ends = np.cumsum([bank.dimension for bank in self.members])[:-1]
        return [np.ascontiguousarray(part) for part in np.split(embedding, ends, axis=-1)]

    def score(self, embedding: NDArray[np.float32], rule: ScoreRule, defects: Defects | None = None) -> Scores:
        """Score images by their patch embeddings (B, h, w, D), float32; see :meth:`MemoryBank.score`.

        Equation 7 takes the members' mean distances too: that of a patch to its nearest vectors, and those to their
        neighbors.
        """
        values = rule.inspected(embedding)
        parts = self.split(values)
        found = [bank.find(part) for bank, part in zip(self.members, parts, strict=True)]
        inspected = weighted_mean([distances for distances, _ in found], self.weights)
        rows = farthest_patches(inspected)
        count = min(rule.num_neighbors, *map(len, self.members))
        support = [
            bank.support(part.reshape(-1, bank.dimension)[rows], indices.reshape(-1)[rows], count)
            for bank, part, (_, indices) in zip(self.members, parts, found, strict=True)
        ]
        if defects is not None:
            inspected = defects.raise_distances(values, inspected)
        patch = rule.on_grid(inspected, embedding.shape[1:3])
        return Scores(reweight(image_score(patch, rule), weighted_mean(support, self.weights)), patch)

    def search_again(self, queries: NDArray[np.float32], factor: int) -> Found:
        """Search more widely for the nearest vectors of a few patches, to show one of them.

        Args:
            queries: Patch embeddings (N, D), float32.
            factor: Width of an approximate search, as a multiple of each bank's own.

        Returns:
            Distance of each patch (N,), float32, and the number of a bank vector (N,), int64: the nearest of the member that
            finds the patch farthest.
        """
        found = [bank.search_again(part, factor) for bank, part in zip(self.members, self.split(queries), strict=True)]
        distances = [distance for distance, _ in found]
        numbers = np.stack([vectors + start for (_, vectors), start in zip(found, self._starts, strict=True)])
        own = np.stack([distance * weight for distance, weight in zip(distances, self.weights, strict=True)])
        return weighted_mean(distances, self.weights), numbers[own.argmax(0), np.arange(len(queries))]


def join_banks(members: Sequence[MemoryBank], weights: Sequence[float]) -> MemoryBank | EnsembleBank:
    """The bank of a single model itself; those of several members as one."""
    return EnsembleBank(members, weights) if len(members) > 1 else members[0]


def save_banks(bank: MemoryBank | EnsembleBank, folder: Path) -> None:
    """Write the bank of each member into the folder of a bundle."""
    for member, (file, _) in zip(bank.members, BANKS, strict=False):
        member.save(folder / file)
