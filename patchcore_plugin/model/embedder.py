"""Patch embeddings of single images, for what compares images without a training."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import read_image
from patchcore_plugin.model.lightning_model import FaissPatchcore
from patchcore_plugin.model.region import check_patches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import RegionOfInterest
    from patchcore_plugin.depth import IntensityRange

_PARTS = {"post_processor": True, "evaluator": False, "visualizer": False}  # of a model, that no embedding depends on


class Embedder:
    """Embeds images as the first backbone of a model with some arguments does.

    Args:
        arguments: Arguments of FaissPatchcore. The further members of an ``ensemble`` are left out.
        count: Number of images that it will embed.

    Raises:
        UsageError: If FaissPatchcore does not take them, or there is no mask image for its ``region_of_interest``.
        ImageError: If the mask image is none.
    """

    def __init__(self, arguments: Mapping[str, Any], count: int) -> None:
        known = inspect.signature(FaissPatchcore).parameters
        unknown = [name for name in arguments if name not in known]
        if unknown:
            msg = f"FaissPatchcore has no argument {', '.join(map(repr, unknown))}."
            raise UsageError(msg)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = FaissPatchcore(**{**arguments, **_PARTS, "ensemble": None}).eval().to(device)
        self._device, self._count = device, count

    @property
    def region(self) -> RegionOfInterest | None:
        """The pixels of the network's input that are inspected; None where all are."""
        return self._module.model.rule.region

    @property
    def intensity_range(self) -> IntensityRange | None:
        """Values that become 0 and 255 of deep images; None where the arguments give none, or take those of the images."""
        return self._module.intensity_range

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Patch embeddings (h, w, D) of an image (H, W, 3), those outside the region included.

        Raises:
            UsageError: If no patch lies in the region.
        """
        image = torch.tensor(pixels).permute(2, 0, 1)[None].to(self._device)
        embedding = self._module.embed(self._module.pre_processor.transform(image.float() / 255), self._count)[0]
        if self.region is not None:
            check_patches(self.region, embedding.shape[:2])
        return embedding

    def stream(self, paths: Sequence[Path], span: IntensityRange | None = None, start: int = 0) -> Iterator[torch.Tensor]:
        """Patch embeddings of each image file from a number on: to the bit the same, wherever that begins.

        Args:
            paths: The files.
            span: Values of deep images that become 0 and 255; None for images of 8 bits.
            start: Number of the first one to embed.
        """
        return (self.embed(read_image(path, intensity_range=span)) for path in paths[start:])
