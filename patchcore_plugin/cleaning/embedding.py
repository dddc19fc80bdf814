"""Patch embeddings of images that are compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchcore_plugin.coreset.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

DEFAULT_ARGUMENTS: dict[str, Any] = {
    "backbone": "efficientnet_lite0",
    "layers": ["blocks.2", "blocks.4"],
    "normalization": "backbone",
}
"""Arguments of FaissPatchcore by which images are compared where none are given."""

HELD_SHARE = 0.5
"""Share of the free memory that embeddings may take."""


class Held:
    """Embeddings that are asked for several times: as many as fit into memory are kept, the others are computed anew.

    Args:
        stream: Gives the embeddings of all images from a number on.
        budget: Bytes that may be kept; None is :data:`HELD_SHARE` of the memory that is free at the first embedding.
    """

    def __init__(self, stream: Callable[[int], Iterator[torch.Tensor]], budget: float | None = None) -> None:
        self._stream, self._budget = stream, budget
        self._held: list[torch.Tensor] = []

    def __call__(self) -> Iterator[torch.Tensor]:
        """The embeddings of all images, in order."""
        yield from self._held
        for number, embedding in enumerate(self._stream(len(self._held)), start=len(self._held)):
            if self._budget is None:
                self._budget = HELD_SHARE * free_memory(embedding.device)
            if number == len(self._held) and (number + 1) * embedding.nbytes <= self._budget:
                self._held.append(embedding)
            yield embedding
