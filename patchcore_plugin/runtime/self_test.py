"""The self-test of a bundle: does it give the same scores on this machine as on the machine that wrote it?

Writing a bundle records the scores of a few pictures in its manifest. Validating it computes them again, and so does
loading it for another device than the CPU. The pictures are made by integer arithmetic alone, without random numbers or a
file: every machine has the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import BundleError, SelfTest, write_manifest
from patchcore_plugin.depth import from_pixels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Manifest
    from patchcore_plugin.depth import IntensityRange

TOLERANCE = {"f32": 2e-3, "bf16": 5e-2, "int8": 5e-2}
"""Largest relative difference of a self-test's score, by the network's precision.

``"f32"``: other CPUs add in another order, which moves embeddings by about 1e-6. An approximate index may then take another
way and find a vector that is a little farther, within 1e-3, :data:`patchcore_plugin.memory_bank.choice.MAX_SCORE_ERROR`.
``"bf16"``: a CPU without bfloat16 computes in float32 instead; 1.1 % was measured. ``"int8"``: layers are rounded to 8 bits,
and a CPU without 8-bit products (VNNI) rounds otherwise; 2.5 % was measured.
"""

_SHAPE = 240, 320


def pictures(intensity_range: IntensityRange | None = None) -> list[NDArray]:
    """Make the test pictures (240, 320, 3), RGB: a ramp, rings, widening stripes, coarse and fine noise.

    They are u8, or float64 values within a bundle's intensity range that become the same pixels. No picture repeats itself:
    among patches that are equally far from the bank, rounding would choose the farthest.
    """
    row, column = np.indices(_SHAPE, dtype=np.int64)
    rings = ((row - 90) ** 2 + (column - 130) ** 2) // 97
    stripes = (column * column // 211 + row // 3) % 256
    values = [row * 2 // 3 + column // 4, rings % 256, stripes, _noise(row // 12, column // 12), _noise(row, column)]
    pixels = [np.stack([(first + shift * row // 7) % 256 for shift in range(3)], 2).astype(np.uint8) for first in values]
    return [from_pixels(picture, intensity_range) for picture in pixels]


def _noise(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    """Values in [0, 256) that look random: an integer hash of the position (Teschner et al. 2003, then mixed once)."""
    mixed = (row * 73856093) ^ (column * 19349663)
    mixed = (mixed ^ (mixed >> 13)) * 1274126177 % 2**32
    return (mixed >> 16) % 256


def record(folder: Path, manifest: Manifest, scores: list[float]) -> None:
    """Add the self-test's scores to the manifest of a bundle whose files are all written.

    Args:
        folder: Folder of the bundle.
        manifest: Its manifest.
        scores: Raw image score of each of :func:`pictures`, computed on the CPU.
    """
    write_manifest(folder, manifest.model_copy(update={"self_test": SelfTest(scores=scores)}))


def deviations(manifest: Manifest, scores: list[float]) -> list[float] | None:
    """Compare the scores of this machine with those of a manifest.

    Args:
        manifest: Manifest of the bundle.
        scores: Raw image score of each of :func:`pictures`.

    Returns:
        Relative difference of each score from the manifest's; None where the manifest has none.

    Raises:
        BundleError: If the manifest has another number of scores than there are pictures.
    """
    if manifest.self_test is None:
        return None
    expected, found = np.array(manifest.self_test.scores), np.array(scores)
    if len(found) != len(expected):
        msg = f"The manifest has {len(expected)} self-test scores, and there are {len(found)} pictures."
        raise BundleError(msg)
    return (np.abs(found - expected) / np.maximum(expected, 1e-12)).tolist()


def check_device_scores(manifest: Manifest, scores: list[float], device: str) -> None:
    """Refuse a device that gives other scores than the CPU of the machine that wrote the bundle.

    Args:
        manifest: Manifest of the bundle.
        scores: Raw image score of each of :func:`pictures`, computed by the device.
        device: The device.

    Raises:
        BundleError: If a score differs by more than :data:`TOLERANCE`, or the manifest has no self-test.
    """
    differences = deviations(manifest, scores)
    if differences is None:
        msg = (
            f"The device {device} is not used: an older version wrote the bundle, without a self-test, so nothing would "
            "show whether it gives the right scores. Export the model again, or use the device CPU."
        )
        raise BundleError(msg)
    worst, tolerance = int(np.argmax(differences)), TOLERANCE[manifest.precision]
    if not differences[worst] <= tolerance:  # NaN too
        msg = (
            f"The device {device} is not used: its score of picture {worst + 1} of the self-test is {scores[worst]:.6g}, "
            f"expected {manifest.self_test.scores[worst]:.6g} ({differences[worst]:.2%} off, tolerance {tolerance:.1%}). "
            "Try the device CPU with `patchcore validate`."
        )
        raise BundleError(msg)
