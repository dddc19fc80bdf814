"""Scores of images that may come again: validation and test often have the same images."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from patchcore_plugin.model.torch_model import read_tiles
from patchcore_plugin.scoring.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchcore_plugin.model.torch_model import FaissPatchcoreModel

_KEPT_BYTES_LIMIT = 2**26  # an image of 32 x 32 patches takes 4 KB


class ScoredImages:
    """Keeps the scores of images on the CPU, so that an image that comes again is neither embedded nor searched again.

    An image is known by its pre-processed pixels, a model by its weights and memory bank.
    """

    def __init__(self) -> None:
        self._model = b""
        self._kept: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        self._bytes = 0

    def begin(self, model: FaissPatchcoreModel) -> None:
        """Begin to score by a model: scores of another one are forgotten."""
        if model.memory_bank.device.type != "cpu":  # an accelerator embeds sooner than pixels are compared
            self._model = b""
            return
        settings = model.rule, model.tiler and read_tiles(model.tiler), model.position_weight
        checksum = hashlib.sha256(repr(settings).encode())
        for name, tensor in model.state_dict().items():
            checksum.update(name.encode())
            checksum.update(_content(tensor))
        if checksum.digest() != self._model:
            self._model, self._kept, self._bytes = checksum.digest(), {}, 0

    def score(self, images: torch.Tensor, score: Callable[[torch.Tensor], Scores]) -> Scores:
        """Scores of images.

        Args:
            images: Pre-processed images (B, 3, H, W).
            score: Function that scores those that are new.

        Returns:
            Their scores, in the order of the images.
        """
        if images.device.type != "cpu" or not self._model:
            return score(images)
        keys = [hashlib.sha256(_content(image)).digest() for image in images]
        known = {key: self._kept[key] for key in keys if key in self._kept}
        new = [number for number, key in enumerate(keys) if key not in known]
        if new:
            found = score(images if len(new) == len(images) else images[new])
            for number, image, patch in zip(new, *found, strict=True):
                known[keys[number]] = image, patch
                if self._bytes + patch.nbytes <= _KEPT_BYTES_LIMIT:
                    self._kept[keys[number]] = image.clone(), patch.clone()
                    self._bytes += patch.nbytes
        return Scores(*map(torch.stack, zip(*(known[key] for key in keys), strict=True)))


def _content(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
