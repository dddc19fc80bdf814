"""Conformal p-values and thresholds: how rare a score is among those of normal images.

A share of the normal images is kept out of the memory bank, and scored: the calibration. A new image's score is then read by
its rank among theirs. That assumes no distribution of the scores, and needs no image with a defect.

The promise, for any number of calibration images: an image that is drawn as they were gets a p-value of at most ``a`` with a
probability of at most ``a``. "Drawn as they were" (exchangeable) means in practice the same part, camera and light, and, as
they, never in the memory bank. The promise is an average over draws of the calibration images. With one fixed calibration
of n images the rate follows a Beta distribution of mean at most ``a`` and standard deviation about ``sqrt(a (1 - a) / n)``.
Where production moves away from the calibration, the promise ends; :mod:`patchcore_plugin.scoring.drift` detects that.

Ties make p-values larger, never smaller, so they keep the promise too.

**Recording sessions.** Images of one session (an afternoon, a batch, a camera) resemble each other more than those of the
next, so that an image of a new session is not drawn as the calibration images were: only the sessions are. A calibration
by J sessions, none with any image in the memory bank, takes the largest of the J thresholds that each session alone gives,
and the largest of the J p-values. Its promise, if the new session is drawn as those were:

* in at least J of J + 1 new sessions, on average, at most a share ``a`` of the session's normal images is above the
  threshold, counted over as many images as a session of the calibration has;
* an image of a new session is above the threshold with a probability of at most ``a + 1 / (J + 1)``.

For the first: the J + 1 sessions' own thresholds are exchangeable, the new session's is the largest of all with a
probability of at most 1 / (J + 1), and above its own threshold lies at most the share ``a`` of any session. The second adds
the probability that an image is above its own session's threshold, set by other images of that session. A promise of ``a``
itself, as :func:`threshold` gives for images, would need ``1 / a - 1`` sessions (19 for 0.05), whatever the method: with
fewer, a new session may be the worst of all too often. Few have so many sessions, so none of those methods is used here.

**A review band.** A second, larger rate gives a second, lower threshold by the same rule, and each promise holds by itself:
at most the first share of the normal images is called anomalous, and at most the second is called anomalous or is to review.

Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005); Angelopoulos and Bates, "A Gentle
Introduction to Conformal Prediction", arXiv 2107.07511, section 1 (the quantile) and 4.4 (outlier detection). For sessions:
Dunn, Wasserman, Ramdas, "Distribution-Free Prediction Sets for Two-Layer Hierarchical Models", arXiv 1809.07441; Lee,
Barber, Willett, "Distribution-free inference with hierarchical data", arXiv 2306.06342.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import MAX_CALIBRATION, Calibration, Scale, Sessions
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def p_value(calibration: Sequence[float], score: float) -> float:
    """Share of scores at least as large as an image's score, its own among them.

    Args:
        calibration: Scores of the calibration images, ascending, at least one.
        score: Score of the image.

    Returns:
        ``(1 + number of calibration scores >= score) / (n + 1)``, in (0, 1]; small for an anomalous image.
    """
    return (1 + len(calibration) - bisect_left(calibration, score)) / (len(calibration) + 1)


def image_p_value(calibration: Calibration, score: float) -> float:
    """p-value of an image's score; with sessions the largest of those that each session gives.

    It is at most the calibration's rate exactly when the score is above the image threshold of :func:`set_thresholds`.

    Args:
        calibration: Calibration of the model.
        score: Score of the image.
    """
    numbers = calibration.sessions and calibration.sessions.scores
    return max(p_value(scores, score) for scores in _by_session(calibration.scores, numbers))


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

    With sessions, each threshold is the largest of those that each session gives. With a review band, the pixel threshold is
    made for its rate, so that regions say where to look in an image to review too.

    Returns:
        The scale of image scores, and the scale of pixels.

    Raises:
        UsageError: If there are too few images, in all or in a session, for the calibration's rate.
    """
    rate, review_rate, sessions = calibration.false_positive_rate, calibration.review_rate, calibration.sessions

    def largest(values: Sequence[float], session: Sequence[int] | None, rate: float) -> float:
        return max(threshold(part, rate) for part in _by_session(values, session))

    scores = calibration.scores, sessions and sessions.scores
    image = largest(*scores, rate)
    pixel = largest(calibration.peaks, sessions and sessions.peaks, review_rate or rate)
    lowest_score, lowest_mean = calibration.scores[0], calibration.means[0]
    return (
        Scale(
            threshold=image,
            minimum=lowest_score,
            maximum=2 * image - lowest_score,
            review=review_rate and largest(*scores, review_rate),
        ),
        Scale(threshold=pixel, minimum=lowest_mean, maximum=2 * pixel - lowest_mean),
    )


def check_review_rate(review_rate: float | None, rate: float) -> None:
    """Refuse a review rate that is not above the false-alarm rate.

    Raises:
        UsageError: If it is not, or is no number in (0, 1).
    """
    if review_rate is None:
        return
    check_number("review_rate", review_rate, 0, 1, closed="neither")
    if review_rate <= rate:
        msg = (
            f"review_rate must be above false_positive_rate, {rate:g}, got {review_rate:g}: it is the share of normal "
            "images that may be stopped or looked at, both together. Leave it out for two answers, normal and anomalous."
        )
        raise UsageError(msg)


def describe_promise(calibration: Calibration) -> str:
    """What the thresholds of a calibration promise for 100 normal parts, as a sentence for the operator.

    Without sessions, the mean number of parts above a threshold follows from its rank: a new normal score is equally likely
    to fall between any two of the calibration's. (Ties make it smaller.)
    """
    rates = [rate for rate in (calibration.false_positive_rate, calibration.review_rate) if rate is not None]
    if calibration.sessions is not None:
        count = len(set(calibration.sessions.scores))
        both = "" if len(rates) == 1 else f", and at most {100 * rates[1]:.3g} be stopped or looked at"
        return (
            f"In at least {count} of {count + 1} new sessions, of 100 good parts at most {100 * rates[0]:.3g} would be "
            f"stopped{both}."
        )
    places = len(calibration.scores) + 1
    stopped, *either = (100 * floor(places * _exact(rate)) / places for rate in rates)
    looked_at = f", and {either[0] - stopped:.3g} more looked at" if either else ""
    return f"Of 100 good parts, {stopped:.3g} would be stopped{looked_at}, on average."


def extend_calibration(
    calibration: Calibration, scores: Sequence[float], peaks: Sequence[float], means: Sequence[float]
) -> Calibration:
    """Add new normal images to a calibration: production is now a mixture of the known and the new kind.

    Where the memory bank has grown since, the numbers of the known images stay as they were. Their distances can only have
    become smaller (and their scores, except for the weight of equation 7), so the thresholds err on the safe side.

    Where the calibration has sessions, the new images are one more. Others of that session are in the bank by now: the
    promise for new sessions rests on those that were held back before.

    Args:
        calibration: Calibration to extend.
        scores: Image scores of the new images.
        peaks: Largest value of each new image's anomaly map.
        means: Mean of each new image's anomaly map.

    Returns:
        The extended calibration, with the same rate. Of more than 10,000 images it keeps 10,000, drawn at random; of
        sessions, as many images of each as fit.

    Raises:
        UsageError: If the calibration has sessions, and there are too few new images to be one.
    """
    check_new_session(calibration, len(scores))
    joined, numbers, count = {}, {}, MAX_CALIBRATION
    for name, added in {"scores": scores, "peaks": peaks, "means": means}.items():
        values = np.array([*getattr(calibration, name), *added], np.float64)
        kept = np.random.default_rng(0).permutation(len(values))
        old = getattr(calibration.sessions, name, None)
        if old is not None:
            session = np.array([*old, *[max(old) + 1] * len(added)])
            kept = thin_sessions(session)
            kept = kept[np.argsort(values[kept], kind="stable")]
            numbers[name], count = session[kept].tolist(), len(kept)
        joined[name] = np.sort(values[kept[:count]]).tolist()  # means, which have no sessions, come last
    sessions = Sessions(**numbers) if numbers else None
    return Calibration(**dict(calibration) | joined | {"sessions": sessions})


def check_new_session(calibration: Calibration, count: int) -> None:
    """Refuse new images that are too few to be one more session of a calibration with sessions.

    Args:
        calibration: Calibration to extend; without sessions, any number of images does.
        count: Number of new images to calibrate by.

    Raises:
        UsageError: If there are too few images, or too many sessions.
    """
    if calibration.sessions is not None:
        counts = Counter(f"number {number}" for number in calibration.sessions.scores)
        counts["of the new images held out"] = count
        check_sessions(counts, calibration.false_positive_rate)


def check_sessions(counts: Mapping[str, int], rate: float) -> None:
    """Refuse sessions that cannot calibrate: too many of them, or one with too few normal images.

    Args:
        counts: Number of normal images of each session.
        rate: False-alarm rate.

    Raises:
        UsageError: If a session has fewer than :func:`images_needed`, or all of them together need more than 10,000.
    """
    needed = images_needed(rate)
    if len(counts) * needed > MAX_CALIBRATION:
        msg = (
            f"A calibration keeps {MAX_CALIBRATION:,} images, and false_positive_rate={rate:g} needs {needed} of each "
            f"session: hold back {MAX_CALIBRATION // needed} sessions at most, not {len(counts)}."
        )
        raise UsageError(msg)
    for name, count in counts.items():
        if count < needed:
            msg = (
                f"false_positive_rate={rate:g} needs at least {needed} normal images of each session that is held back, and "
                f"session {name} has {count}. Take more images in a session, or allow more false alarms: "
                f"{1 / (count + 1):.3g} is the lowest rate for {count} images."
            )
            raise UsageError(msg)


def thin_sessions(session: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose the images that a calibration keeps: at most 10,000, as many of each session as fit, drawn at random.

    Args:
        session: Session of each image (n,), counted from 0.

    Returns:
        Indices of the images, ascending.
    """
    if len(session) <= MAX_CALIBRATION:
        return np.arange(len(session))
    order = np.random.default_rng(0).permutation(len(session))
    count = session.max() + 1
    kept = [order[session[order] == number][: MAX_CALIBRATION // count] for number in range(count)]
    return np.sort(np.concatenate(kept))


def _by_session(values: Sequence[float], session: Sequence[int] | None) -> list[Sequence[float]]:
    """The values of each session, in the order that they have; all together without sessions."""
    if session is None:
        return [values]
    parts: list[list[float]] = [[] for _ in range(max(session) + 1)]
    for value, number in zip(values, session, strict=True):
        parts[number].append(value)
    return parts


def _exact(rate: float) -> Fraction:
    """The decimal number as it was written: 0.07 itself, not the float next to it, decides where ranks meet the rate."""
    return Fraction(str(float(rate)))
