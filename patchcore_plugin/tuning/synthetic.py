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

from patchcore_plugin.pasting import draw_window, paste

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

NOISE_SIDE = 0.1, 0.3
"""Least and largest side of the window of noise, as a share of the image's."""

NOISE_BLEND = 0.1, 0.5
"""Least and largest share of the noise in the pixels that it changes."""

_MIN_SIDE = 17  # pixels of an image for anomalib's generator, which fails below for some of its patterns


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


def add_defect(
    image: NDArray[np.uint8],
    defect: SyntheticDefect,
    source: NDArray[np.uint8],
    inspected: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Make a synthetic defect in an image.

    Args:
        image: Normal image (H, W, 3), RGB.
        defect: What to make.
        source: Image (h, w, 3) that a pasted window is cut out of.
        inspected: Where the defect's center may lie, as in :func:`patchcore_plugin.pasting.draw_window`.

    Returns:
        Image (H, W, 3) with the defect.
    """
    if defect.kind == "paste":
        return paste(image, source, defect.seed, inspected)
    rng = random.Random(defect.seed)  # noqa: S311
    changed, window = image.copy(), draw_window(image, rng, NOISE_SIDE, inspected)
    changed[window] = _with_noise(image[window], rng)
    return changed


def _with_noise(pixels: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    down, across = (-(-_MIN_SIDE // side) for side in pixels.shape[:2])
    larger = torch.tensor(pixels.repeat(down, axis=0).repeat(across, axis=1))
    with torch.random.fork_rng(devices=[]):  # anomalib draws from torch's generator
        torch.manual_seed(rng.getrandbits(32))
        generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=NOISE_BLEND)
        changed, _ = generator(larger.permute(2, 0, 1).float() / 255)
    changed = (changed.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()[::down, ::across]
    return 255 - pixels if np.array_equal(changed, pixels) else changed  # a few pixels may lie beside all spots
