"""Conformal p-values and thresholds: how rare a score is among those of normal images.

A share of the normal images is kept out of the memory bank, and scored: the calibration. A new image's score is then read by
its rank among theirs. That assumes no distribution of the scores, and needs no image with a defect.

The promise, for any number of calibration images: an image that is drawn as they were gets a p-value of at most ``a`` with a
probability of at most ``a``. "Drawn as they were" (exchangeable) means in practice the same part, camera and light, and, as
they, never in the memory bank. The promise is an average over draws of the calibration images. With one fixed calibration
of n images the rate follows a Beta distribution of mean at most ``a`` and standard deviation about ``sqrt(a (1 - a) / n)``.
Where production moves away from the calibration, the promise ends; :mod:`patchcore_plugin.scoring.drift` detects that.

Ties make p-values larger, never smaller, so they keep the promise too.

Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005); Angelopoulos and Bates, "A Gentle
Introduction to Conformal Prediction", arXiv 2107.07511, section 1 (the quantile) and 4.4 (outlier detection).
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import MAX_CALIBRATION, Calibration, Scale
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def p_value(calibration: Sequence[float], score: float) -> float:
    """Share of scores at least as large as an image's score, its own among them.

    Args:
        calibration: Scores of the calibration images, ascending, at least one.
        score: Score of the image.

    Returns:
        ``(1 + number of calibration scores >= score) / (n + 1)``, in (0, 1]; small for an anomalous image.
    """
    return (1 + len(calibration) - bisect_left(calibration, score)) / (len(calibration) + 1)


def threshold(calibration: Sequence[float], rate: float) -> float:
    """Score above which a normal image lies with a probability of at most ``rate``.

    A score is above it exactly when its p-value is at most ``rate``.

    Args:
        calibration: Scores of the calibration images, ascending.
        rate: False-alarm rate, in (0, 1).

    Returns:
        The ``ceil((n + 1) (1 - rate))``-th smallest calibration score.

    Raises:
        UsageError: If the rate is out of range, or there are too few images for it: :func:`images_needed`.
    """
    count = len(calibration)
    if count < images_needed(rate):
        msg = f"A false-alarm rate of {rate:g} needs at least {images_needed(rate)} normal images, got {count}."
        raise UsageError(msg)
    return calibration[count - floor((count + 1) * _exact(rate))]


def images_needed(rate: float) -> int:
    """Fewest calibration images with which ``rate`` can be promised: ``ceil(1 / rate) - 1``.

    With fewer images, even a score above all others has a p-value larger than ``rate``.

    Raises:
        UsageError: If the rate is out of range.
    """
    check_number("false_positive_rate", rate, 0, 1, closed="neither")
    return ceil(1 / _exact(rate)) - 1


def set_thresholds(calibration: Calibration) -> tuple[Scale, Scale]:
    """Set the thresholds for images and pixels, and the ranges that normalization scales by.

    Without defective images there is no largest score to scale by. Normalized image scores are 0 at the smallest calibration
    score, 0.5 at the threshold, and 1 as far above the threshold as 0 lies below it. Normalized maps are 0 at the smallest
    mean of a calibration image's map, and otherwise alike.

    Returns:
        The scale of image scores, and the scale of pixels.

    Raises:
        UsageError: If there are too few images for the calibration's rate.
    """
    image = threshold(calibration.scores, calibration.false_positive_rate)
    pixel = threshold(calibration.peaks, calibration.false_positive_rate)
    lowest_score, lowest_mean = calibration.scores[0], calibration.means[0]
    return (
        Scale(threshold=image, minimum=lowest_score, maximum=2 * image - lowest_score),
        Scale(threshold=pixel, minimum=lowest_mean, maximum=2 * pixel - lowest_mean),
    )


def extend_calibration(
    calibration: Calibration, scores: Sequence[float], peaks: Sequence[float], means: Sequence[float]
) -> Calibration:
    """Add new normal images to a calibration: production is now a mixture of the known and the new kind.

    Where the memory bank has grown since, the numbers of the known images stay as they were. Their distances can only have
    become smaller (and their scores, except for the weight of equation 7), so the thresholds err on the safe side.

    Args:
        calibration: Calibration to extend.
        scores: Image scores of the new images.
        peaks: Largest value of each new image's anomaly map.
        means: Mean of each new image's anomaly map.

    Returns:
        The extended calibration, with the same rate. Of more than 10,000 images it keeps 10,000, drawn at random.
    """
    joined = {}
    for name, added in {"scores": scores, "peaks": peaks, "means": means}.items():
        values = np.array([*getattr(calibration, name), *added], np.float64)
        kept = np.random.default_rng(0).permutation(len(values))[:MAX_CALIBRATION]
        joined[name] = np.sort(values[kept]).tolist()
    return Calibration(false_positive_rate=calibration.false_positive_rate, **joined)


def _exact(rate: float) -> Fraction:
    """The decimal number as it was written: 0.07 itself, not the float next to it, decides where ranks meet the rate."""
    return Fraction(str(float(rate)))
