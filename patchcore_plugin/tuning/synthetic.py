"""Synthetic defects: changes of a small window of a normal image, for where no real defect is at hand.

Two kinds: noise in spots of Perlin noise, by anomalib's own generator (as in DRAEM, Zavrtanik et al. 2021), and a window cut
out of a normal image, turned and pasted elsewhere (as in CutPaste, Li et al. 2021). Both are small and faint, so that no
setting finds them all. What a setting gains on them need not be what it gains on real defects.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

NOISE_SIDE = 0.1, 0.3
"""Least and largest side of the window of noise, as a share of the image's."""

NOISE_BLEND = 0.1, 0.5
"""Least and largest share of the noise in the pixels that it changes."""

PASTE_SIDE = 0.04, 0.15
"""Least and largest side of a pasted window, as a share of the image's."""

PASTE_GAIN = 0.7, 1.3
"""Least and largest factor of a pasted window's intensity."""

PASTE_BLEND = 1.0, 1.0
"""Least and largest share of the pasted window in the pixels that it covers."""

_MIN_SIDE = 4  # pixels of a window


@dataclass(frozen=True)
class SyntheticDefect:
    """How a synthetic defect is made; the same each time.

    Attributes:
        parent: Number of the normal image that gets it.
        path: Path of that image.
        kind: ``"noise"`` or ``"paste"``.
        source: Image that a pasted window is cut out of.
        seed: Seed of place, size and strength.
    """

    parent: int
    path: Path
    kind: Literal["noise", "paste"]
    source: Path
    seed: int


def draw_defects(paths: Sequence[Path], seed: int) -> list[SyntheticDefect]:
    """Draw a defect for each of N normal images, the two kinds in turn; a window is cut out of the image before it."""
    rng = random.Random(seed)  # noqa: S311
    kinds = ("noise", "paste")
    return [
        SyntheticDefect(number, path, kinds[number % 2], paths[number - 1], rng.getrandbits(32))
        for number, path in enumerate(paths)
    ]


def add_defect(image: NDArray[np.uint8], defect: SyntheticDefect, source: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make a synthetic defect in an image.

    Args:
        image: Normal image (H, W, 3), RGB.
        defect: What to make.
        source: Image (h, w, 3) that a pasted window is cut out of.

    Returns:
        Image (H, W, 3) with the defect.
    """
    rng = random.Random(defect.seed)  # noqa: S311
    changed = image.copy()
    if defect.kind == "noise":
        window = _window(image, rng, NOISE_SIDE)
        changed[window] = _with_noise(image[window], rng)
    else:
        window = _window(image, rng, PASTE_SIDE)
        changed[window] = _pasted(image[window], source, rng)
    return changed


def _window(image: NDArray[np.uint8], rng: random.Random, side: tuple[float, float]) -> tuple[slice, slice]:
    """A random window; its height and width are drawn apart."""
    slices = []
    for length in image.shape[:2]:
        extent = min(length, max(_MIN_SIDE, round(length * rng.uniform(*side))))
        start = rng.randint(0, length - extent)
        slices.append(slice(start, start + extent))
    return slices[0], slices[1]


def _with_noise(pixels: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    if min(pixels.shape[:2]) < _MIN_SIDE:  # too small for a pattern
        return 255 - pixels
    with torch.random.fork_rng(devices=[]):  # anomalib draws from torch's generator
        torch.manual_seed(rng.getrandbits(32))
        generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=NOISE_BLEND)
        changed, _ = generator(torch.tensor(pixels).permute(2, 0, 1).float() / 255)
    return (changed.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _pasted(pixels: NDArray[np.uint8], source: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """Pixels under a window of the source, turned by a multiple of 90 degrees, and brighter or darker."""
    turned = np.rot90(source, rng.randrange(4))
    height, width = (min(sides) for sides in zip(pixels.shape[:2], turned.shape[:2], strict=True))
    top, left = rng.randint(0, turned.shape[0] - height), rng.randint(0, turned.shape[1] - width)
    cut = turned[top : top + height, left : left + width] * rng.uniform(*PASTE_GAIN)
    share, under = rng.uniform(*PASTE_BLEND), pixels[:height, :width]
    changed = pixels.copy()
    changed[:height, :width] = (under + share * (cut - under)).clip(0, 255).round()
    return changed
