"""How a raw score is read: threshold, sensitivity, normalization, rounding, verdict. For image scores and pixels alike.

Training sets a raw threshold and, for normalization, the range of raw scores seen in validation (:class:`Scale`). anomalib
normalizes first and moves the threshold by a sensitivity afterwards; the functions here give the same verdicts from raw
scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Scale

ROUNDING = 1e-5
"""Relative difference of two scores that counts as rounding.

anomalib's adaptive threshold is itself the score of a validation image, and another runtime rounds that score differently.
A score within this difference of the threshold is not above it; a calibration score within it counts as a tie.
"""


def raw_threshold(scale: Scale) -> float | None:
    """Raw score above which something is anomalous, sensitivity included; None without a threshold."""
    if scale.threshold is None or scale.minimum is None or scale.maximum is None:
        return scale.threshold
    return scale.threshold + (0.5 - scale.sensitivity) * (scale.maximum - scale.minimum)


def normalize(values: NDArray[np.float32], scale: Scale) -> NDArray[np.float32] | None:
    """Scale raw scores to [0, 1] with the threshold at 0.5, as anomalib's post-processor does.

    The sensitivity leaves normalized scores as they are: it moves the threshold, not the scores.

    Args:
        values: Raw scores, any shape, in feature units.
        scale: The model's scale. Without a threshold, the middle of its range is at 0.5. A range of no width leaves three
            values only: 0 below, 0.5 at, and 1 above the threshold.

    Returns:
        Normalized scores, float32, in the shape of ``values``; None where the scale has no range.
    """
    if scale.minimum is None or scale.maximum is None:
        return None
    middle = np.float32((scale.minimum + scale.maximum) / 2 if scale.threshold is None else scale.threshold)
    values = np.asarray(values, dtype=np.float32)
    if scale.maximum == scale.minimum:
        return (0.5 + 0.5 * np.sign(values - middle)).astype(np.float32)
    return np.clip((values - middle) / np.float32(scale.maximum - scale.minimum) + np.float32(0.5), 0, 1)


def verdict(score: float, scale: Scale) -> Literal["normal", "anomalous"] | None:
    """Verdict on a raw image score; None without a threshold."""
    threshold = raw_threshold(scale)
    if threshold is None:
        return None
    anomalous = score > threshold * (1 + ROUNDING)
    normalized = normalize(np.float32([score]), scale)
    if normalized is not None:  # as anomalib: a sensitivity of 0 calls nothing anomalous
        anomalous = anomalous and float(normalized[0]) > 1 - scale.sensitivity
    return "anomalous" if anomalous else "normal"


def without_rounding(score: float) -> float:
    """The score, lowered by rounding: compare it with calibration scores, and one that differs by rounding is a tie."""
    return score / (1 + ROUNDING)


def display_values(values: NDArray[np.float32], scale: Scale) -> NDArray[np.float32]:
    """Raw values of an anomaly map (H, W) for display, with the raw threshold, sensitivity included, at 0.5.

    Returns:
        Values around [0, 1], float32. Without a range to normalize by, the map is stretched from 0 to its own largest value.
    """
    normalized = normalize(values, scale)
    if normalized is None:
        return values / max(float(values.max()), 1e-12)
    return normalized + np.float32(scale.sensitivity - 0.5)
