"""How a raw score is read: threshold, sensitivity, normalization, rounding, verdict. The same for image scores and pixels.

Training sets a raw threshold and, for normalization, a range of raw scores (:class:`patchcore_plugin.bundle.Scale`).
anomalib normalizes first and then moves the threshold by the sensitivity; the functions here give the same verdicts from raw
scores.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Scale

ROUNDING = 1e-5
"""Largest relative difference of two scores that counts as rounding.

anomalib's adaptive threshold is the score of a validation image, and another runtime rounds that score differently. A score
within this difference of the threshold is not above it. A score within this difference of a calibration score is a tie.
"""


Verdict = Literal["normal", "review", "anomalous"]
"""What a score means; "review" in the band between two thresholds, which a model has if its calibration asked for one."""


def raw_threshold(scale: Scale) -> float | None:
    """Raw score above which something is anomalous, sensitivity included; None without a threshold."""
    return _moved(scale.threshold, scale)


def raw_review_threshold(scale: Scale) -> float | None:
    """Raw score above which an image is to review at least, sensitivity included; None without a review band."""
    return _moved(scale.review, scale)


def verdict_limit(scale: Scale) -> float | None:
    """Raw score above which a verdict is "anomalous": the raw threshold, plus rounding; None without a threshold.

    Infinite at a sensitivity of 0, which calls nothing anomalous: anomalib's normalized scores are never above 1.
    """
    return _limit(raw_threshold(scale), scale)


def verdict(score: float, scale: Scale) -> Verdict | None:
    """Verdict on a raw score; None without a threshold."""
    limit, review = verdict_limit(scale), _limit(raw_review_threshold(scale), scale)
    if limit is None:
        return None
    if score > limit:
        return "anomalous"
    return "normal" if review is None or score <= review else "review"


def _moved(threshold: float | None, scale: Scale) -> float | None:
    if threshold is None or scale.minimum is None or scale.maximum is None:
        return threshold
    return threshold + (0.5 - scale.sensitivity) * (scale.maximum - scale.minimum)


def _limit(threshold: float | None, scale: Scale) -> float | None:
    if threshold is None:
        return None
    if scale.sensitivity == 0 and scale.minimum is not None and scale.maximum is not None:
        return math.inf
    return threshold + ROUNDING * abs(threshold)


def without_rounding(score: float) -> float:
    """Lower a raw score by rounding, so that a calibration score that differs by rounding alone is a tie."""
    return score / (1 + ROUNDING)


def normalize(values: NDArray[np.float32], scale: Scale) -> NDArray[np.float32] | None:
    """Scale raw scores to [0, 1] with the threshold at 0.5, as anomalib's post-processor does.

    The sensitivity has no effect here: it moves the threshold, not the scores.

    Args:
        values: Raw scores, any shape, in feature units.
        scale: The model's scale. Without a threshold, the middle of the range is at 0.5. With a range of length 0, values
            are 0 below, 0.5 at and 1 above the threshold.

    Returns:
        Normalized scores, float32, in the shape of ``values``; None where the scale has no range.
    """
    if scale.minimum is None or scale.maximum is None:
        return None
    middle = np.float32((scale.minimum + scale.maximum) / 2 if scale.threshold is None else scale.threshold)
    values = np.asarray(values, dtype=np.float32)
    length = np.float32(scale.maximum - scale.minimum)
    if not length:
        return (0.5 + 0.5 * np.sign(values - middle)).astype(np.float32)
    with np.errstate(over="ignore"):  # of a tiny length
        return np.clip((values - middle) / length + np.float32(0.5), 0, 1)


def display_values(values: NDArray[np.float32], scale: Scale) -> NDArray[np.float32]:
    """Scale the raw values of an anomaly map (H, W) for display, with the raw threshold, sensitivity included, at 0.5.

    Returns:
        Values around [0, 1], float32. Where the scale has no range, the map is divided by its own largest value.
    """
    normalized = normalize(values, scale)
    if normalized is None:
        return values / max(float(values.max()), 1e-12)
    return normalized + np.float32(scale.sensitivity - 0.5)
