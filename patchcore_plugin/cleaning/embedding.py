"""Patch embeddings of images that are compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.memory import free_memory
from patchcore_plugin.images import read_image
from patchcore_plugin.model.embedding_engine import EmbeddingEngine
from patchcore_plugin.model.pre_processing import build_pre_processor
from patchcore_plugin.model.torch_model import FaissPatchcoreModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from patchcore_plugin.depth import IntensityRange

HELD_SHARE = 0.5
"""Share of the free memory that embeddings may take."""


class Network(NamedTuple):
    """The backbone that compares images.

    Attributes:
        backbone: Its name, as FaissPatchcore takes it.
        layers: Its feature layers.
        image_size: Height and width of its input, in pixels.
    """

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ("blocks.2", "blocks.4")
    image_size: tuple[int, int] = (256, 256)


class Embedder:
    """Embeds images by a backbone, normalized as its weights were trained."""

    def __init__(self, network: Network) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = FaissPatchcoreModel(network.layers, network.backbone).eval().to(self._device)
        pre_processor = build_pre_processor(network.image_size, normalization="backbone", backbone=network.backbone)
        self._transform = pre_processor.transform
        self._engine = EmbeddingEngine("auto")

    @torch.inference_mode()
    def stream(self, paths: Sequence[Path], span: IntensityRange | None, start: int = 0) -> Iterator[torch.Tensor]:
        """Patch embeddings (h, w, D) of each image from a number on: to the bit the same, wherever that begins."""
        for path in paths[start:]:
            pixels = torch.tensor(read_image(path, intensity_range=span)).permute(2, 0, 1)[None]
            images = self._transform(pixels.to(self._device).float() / 255)
            yield self._model.embed(images, self._engine.network(self._model, images, len(paths)))[0]


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
