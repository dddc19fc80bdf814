"""How rare a score is among those of normal images: conformal p-values and thresholds.

A share of the normal images is held back from training, and scored. A new image's score is then read by its rank among
theirs. That asks nothing of the scores' distribution, and no image with a defect.

The promise, for any number of calibration images: an image that is drawn as they were (exchangeable with them; in practice
same part, same camera, same light, and, as they, never in the memory bank) gets a p-value of at most ``a`` with a
probability of at most ``a``. It is a promise on average over draws of the calibration images: with one certain set of them
the rate is as near to it as their number allows (a Beta distribution, of mean at most ``a`` and, for n images, of standard
deviation about ``sqrt(a (1 - a) / n)``). Where production moves away from the calibration, it ends; that is what
:mod:`patchcore_plugin.scoring.drift` watches.

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

if TYPE_CHECKING:
    from collections.abc import Sequence


def p_value(calibration: Sequence[float], score: float) -> float:
    """Share of scores at least as large, the image's own among them.

    Args:
        calibration: Scores of the calibration images, ascending, at least one.
        score: Score of the image.

    Returns:
        ``(1 + number of calibration scores >= score) / (n + 1)``, in (0, 1]; small for an anomalous image.
    """
    return (1 + len(calibration) - bisect_left(calibration, score)) / (len(calibration) + 1)


def threshold(calibration: Sequence[float], rate: float) -> float:
    """The score above which a normal image lies with a probability of at most ``rate``.

    A score is above it exactly when its p-value is at most ``rate``.

    Args:
        calibration: Scores of the calibration images, ascending.
        rate: False-alarm rate, in (0, 1).

    Returns:
        The ``ceil((n + 1) (1 - rate))``-th smallest calibration score.

    Raises:
        ValueError: If the rate is out of range, or there are too few images for it: :func:`images_needed`.
    """
    count = len(calibration)
    if count < images_needed(rate):
        msg = f"A false-alarm rate of {rate:g} needs at least {images_needed(rate)} normal images, got {count}."
        raise ValueError(msg)
    return calibration[count - floor((count + 1) * _exact(rate))]


def scales(calibration: Calibration) -> tuple[Scale, Scale]:
    """Thresholds for images and pixels, and how scores are normalised by them.

    Without defective images there is no largest score to scale by. Normalised scores are 0 at the smallest of the
    calibration, 0.5 at the threshold, and 1 as far above it as that lies below; maps are 0 at the smallest mean of a
    calibration image's.

    Raises:
        ValueError: If there are too few images for the calibration's rate.
    """
    image = threshold(calibration.scores, calibration.false_positive_rate)
    pixel = threshold(calibration.peaks, calibration.false_positive_rate)
    low, dark = calibration.scores[0], calibration.means[0]
    return (
        Scale(threshold=image, minimum=low, maximum=2 * image - low),
        Scale(threshold=pixel, minimum=dark, maximum=2 * pixel - dark),
    )


def extended(
    calibration: Calibration, scores: Sequence[float], peaks: Sequence[float], means: Sequence[float]
) -> Calibration:
    """The calibration with more normal images in it: production is now a mixture of both kinds.

    Where the memory bank has grown since, the known images' numbers stay as they were: their distances can only have become
    smaller (and their scores, but for the weight of equation 7), so thresholds are on the safe side.

    Args:
        calibration: What is known.
        scores: Image scores of the new images.
        peaks: The largest value of each one's anomaly map.
        means: The map's means.

    Returns:
        It, with the same rate. Of more than 10,000 images, as many drawn at random.
    """
    joined = {}
    for name, more in {"scores": scores, "peaks": peaks, "means": means}.items():
        values = np.array([*getattr(calibration, name), *more], np.float64)
        kept = np.random.default_rng(0).permutation(len(values))[:MAX_CALIBRATION]
        joined[name] = np.sort(values[kept]).tolist()
    return Calibration(false_positive_rate=calibration.false_positive_rate, **joined)


def images_needed(rate: float) -> int:
    """The fewest calibration images with which ``rate`` can be promised: ``ceil(1 / rate) - 1``.

    With fewer, even the p-value of a score above all others is larger than ``rate``.

    Raises:
        ValueError: If the rate is out of range.
    """
    if not 0 < rate < 1:
        msg = f"A false-alarm rate lies between 0 and 1, got {rate!r}."
        raise ValueError(msg)
    return ceil(1 / _exact(rate)) - 1


def _exact(rate: float) -> Fraction:
    """The decimal number that was written: 0.07 itself, not the float next to it, decides where ranks meet it."""
    return Fraction(str(float(rate)))
