"""Changed copies of the training images, whose patches the memory bank learns too: for trainings with few images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from torch.nn import functional as F
from torchvision.transforms.v2 import Normalize

from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Transform


class PixelScale(NamedTuple):
    """Normalization of images: pixel values in [0, 1] are ``image * std + mean``.

    Attributes:
        mean: Mean of each channel (3, 1, 1), or of all (1,).
        std: Standard deviation of each channel, in the same shape.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, transform: Transform | None) -> PixelScale:
        """Read the normalization of a pre-processor's transform; without one, pixel values are the image's."""
        found = extract_transforms_by_type(transform, Normalize)
        if not found:
            return cls(torch.zeros(1), torch.ones(1))
        return cls(*(torch.tensor(values).reshape(-1, 1, 1) for values in (found[-1].mean, found[-1].std)))


@dataclass(frozen=True)
class Change:
    """A change of an image, whose parts are made in this order.

    Attributes:
        flipped: Axes that are reversed: -1 for left and right, -2 for top and bottom.
        quarters: Quarter turns, counterclockwise.
        degrees: Further turn, counterclockwise. Beyond the border, the image is reflected.
        brightness: Factor of the pixel values, which end at white.
    """

    flipped: tuple[int, ...] = ()
    quarters: int = 0
    degrees: float = 0
    brightness: float = 1

    def apply(self, images: torch.Tensor, scale: PixelScale) -> torch.Tensor:
        """Changed copies of normalized images (B, 3, H, W); a quarter turn swaps height and width."""
        images = self._move(images, "bilinear")
        if self.brightness != 1:
            mean, std = (values.to(images) for values in scale)
            images = (((images * std + mean) * self.brightness).clamp(0, 1) - mean) / std
        return images

    @property
    def moves(self) -> bool:
        """Whether pixels of a copy lie elsewhere than in its image."""
        return bool(self.flipped or self.quarters or self.degrees)

    def origins(self, rows: int, columns: int) -> torch.Tensor:
        """Which patches of the original the patches of its copy are, row by row.

        Args:
            rows: Rows of the original's patch grid.
            columns: Columns of the original's patch grid.

        Returns:
            Numbers of the original's patches (rows * columns,), int64, counted row by row.
        """
        numbers = torch.arange(rows * columns, dtype=torch.float32).reshape(1, 1, rows, columns)
        return self._move(numbers, "nearest").long().flatten()

    def _move(self, images: torch.Tensor, mode: str) -> torch.Tensor:
        """Images (B, C, H, W) with their pixels moved, as ``mode`` interpolates between them."""
        images = torch.rot90(images.flip(self.flipped), self.quarters, (-2, -1))
        if not self.degrees:
            return images
        height, width = images.shape[-2:]
        sine, cosine = math.sin(math.radians(self.degrees)), math.cos(math.radians(self.degrees))
        # from a place in the copy to the place in the image, both from -1 to 1 along each axis
        turn = torch.tensor([[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]], device=images.device)
        with torch.autocast(images.device.type, enabled=False):  # places need more digits than those of bfloat16
            places = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
            turned = F.grid_sample(images.float(), places, mode, padding_mode="reflection", align_corners=False)
        return turned.to(images.dtype)


AUGMENTATIONS: dict[str, tuple[Change, ...]] = {
    "mirror": (Change(flipped=(-1,)),),
    "flip": (Change(flipped=(-2,)),),
    "half_turn": (Change(quarters=2),),
    "quarter_turns": (Change(quarters=1), Change(quarters=3)),
    "small_turns": (Change(degrees=-5), Change(degrees=5)),
    "brightness": (Change(brightness=0.8), Change(brightness=1.2)),
}
"""The changes that each name of the model's argument ``augmentations`` stands for."""


def check_augmentations(names: Any) -> list[str]:
    """The names as a plain list.

    Raises:
        UsageError: Unless ``names`` is None or different names of :data:`AUGMENTATIONS`.
    """
    known = ", ".join(AUGMENTATIONS)
    if names is None:
        return []
    if isinstance(names, str) or not isinstance(names, Sequence):
        msg = f"augmentations must be a list of names among {known}, e.g. [mirror, flip], got {short(names)}."
        raise UsageError(msg)
    names = list(names)
    for place, name in enumerate(names):
        if not isinstance(name, str) or name not in AUGMENTATIONS:
            msg = f"augmentations has {short(name)}, which is none of {known}."
            raise UsageError(msg)
        if name in names[:place]:
            msg = f"augmentations has {name!r} twice: name each once."
            raise UsageError(msg)
    return names


def changes_of(names: Sequence[str]) -> list[Change]:
    """The changes that some names stand for, in order."""
    return [change for name in names for change in AUGMENTATIONS[name]]
