"""Drift: has production moved away from the images that the model was calibrated on? Light, camera, focus, material.

Every image is a set of bets against the hypothesis that nothing has moved. The bets look at image scores and at mean
distances (the mean of the anomaly map), each in both directions, as blur for example may make scores smaller. Each bet is on
one event: an image lies beyond a quantile of the calibration.

    n     number of calibration images
    k     rank of the quantile: the k-th smallest calibration value
    b     upper limit of the share of normal images beyond the quantile
    d     share of production that may be defective without being drift (``DEFECT_SHARE``); defects score whatever they like
    p0    largest probability of the event without drift, d + (1 - d) b
    w     stake of the bet
    e     factor that one image pays: 1 + w (1 - p0) / p0 if the event happens, 1 - w if not
    R     sum of the products of e over all starting images so far, updated as (1 + R) e (Shiryaev and Roberts)

**The limit b.** A quantile of n calibration images is not the quantile of production. The share of normal images beyond it
follows Beta(n + 1 - k, k), and b is its upper confidence limit (Clopper and Pearson 1934). All limits hold together for 999
of 1000 draws of the calibration images. Without b and d, enough images would reveal that the calibration is finite, or that
there are defects, and both would look like drift.

**The evidence** is the mean of R over all bets. As long as the probability of the event is at most p0, whatever came before,
the mean of e is at most 1, and the mean of the evidence after t images is at most t, however the bets depend on each other.
Hence, without drift, the mean number of images to a false alarm is at least ``ALARM_LEVEL``, and the probability of a false
alarm within N images is at most N / ``ALARM_LEVEL``.
Source: Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", arXiv 2203.03532.

A new batch of material, whose images resemble each other, counts as drift here.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from math import ceil, lgamma
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from patchcore_plugin.bundle import Calibration

ALARM_LEVEL = 1e6
"""Evidence that counts as drift. Without drift the mean number of images to a false alarm is at least this large."""

DEFECT_SHARE = 0.1
"""Share of defective images in production that does not count as drift."""

RECENT_IMAGES = 50
"""Number of latest images whose medians the state shows."""

_QUANTILES = (0.5, 0.75, 0.9)
_STAKES = (0.5, 0.9)
_LIMITS_RISK = 1e-3  # probability, over draws of the calibration images, that one of the limits b does not hold
_DIRECTIONS = ("scores are larger", "scores are smaller", "distances are larger", "distances are smaller")


@dataclass(frozen=True)
class DriftState:
    """What a monitor has found so far.

    Attributes:
        images: Number of images so far.
        evidence: Evidence of drift; around 1 without drift.
        threshold: Evidence that counts as drift.
        drifted: Whether the evidence reached the threshold, and has stayed above the threshold's square root since.
        since: Time at which the evidence reached the threshold; None without drift.
        what: Direction of the strongest evidence, such as ``"scores are larger"``; None without drift.
        score: Median image score of the latest 50 images; None before the first image.
        normal_score: Median image score of the calibration.
        distance: Median mean distance of the latest 50 images; None before the first image.
        normal_distance: Median mean distance of the calibration.
    """

    images: int
    evidence: float
    threshold: float
    drifted: bool
    since: datetime | None
    what: str | None
    score: float | None
    normal_score: float
    distance: float | None
    normal_distance: float


class DriftMonitor:
    """Compares images, one after the other, with the calibration. Several threads may share a monitor.

    Args:
        calibration: Calibration of the bundle. A change that moves all images beyond the 90 % quantile of the calibration is
            detected after 16 images with 100 calibration images, and after 24 with 30.

    Example:
        >>> monitor = DriftMonitor(runtime.manifest.calibration)
        >>> for prediction in runtime.stream(images):
        ...     monitor.update(prediction.score, prediction.mean_distance)
        >>> monitor.state.drifted
        False
    """

    def __init__(self, calibration: Calibration) -> None:
        scores, means = np.array(calibration.scores), np.array(calibration.means)
        count = len(scores)
        ranks = [ceil(share * count) for share in _QUANTILES]
        # values that are smaller than a quantile are negated values that are larger
        directions = [scores, -scores[::-1], means, -means[::-1]]
        self._quantiles = np.array([[values[rank - 1] for rank in ranks] for values in directions])  # (4, quantiles)
        risk = _LIMITS_RISK / self._quantiles.size
        share = np.array([limit_share_beyond(count, rank, risk) for rank in ranks])
        probability = (DEFECT_SHARE + (1 - DEFECT_SHARE) * share)[:, None]
        stakes = np.array(_STAKES)
        self._factor_lost = 1 - stakes  # (stakes,)
        self._factor_won = 1 + stakes * (1 - probability) / probability  # (quantiles, stakes)
        self._evidence = np.zeros((*self._quantiles.shape, len(stakes)))
        # one bet at this limit is drift by itself; more evidence would only make the return to normal longer
        self._evidence_limit = ALARM_LEVEL * self._evidence.size
        self._normal = float(np.median(scores)), float(np.median(means))
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_IMAGES)
        self._images = 0
        self._since: datetime | None = None
        self._lock = threading.Lock()

    def update(self, score: float, distance: float) -> bool:
        """Add an image.

        Args:
            score: Raw image score.
            distance: Mean distance: the mean of the image's anomaly map.

        Returns:
            Whether drift begins with this image.
        """
        values = np.array([score, -score, distance, -distance])
        won = (values[:, None] > self._quantiles)[..., None]
        factor = np.where(won, self._factor_won, self._factor_lost)
        with self._lock:
            self._images += 1
            self._recent.append((score, distance))
            self._evidence = np.minimum((1 + self._evidence) * factor, self._evidence_limit)
            evidence = self._evidence.mean()
            if self._since is None and evidence >= ALARM_LEVEL:
                self._since = datetime.now(timezone.utc)
                return True
            if self._since is not None and evidence < ALARM_LEVEL**0.5:
                self._since = None
        return False

    @property
    def drifted(self) -> bool:
        """Whether production has drifted."""
        return self._since is not None

    @property
    def evidence(self) -> float:
        """Evidence of drift, to be compared with :data:`ALARM_LEVEL`."""
        return float(self._evidence.mean())

    @property
    def state(self) -> DriftState:
        """What the monitor has found so far."""
        with self._lock:
            images, evidence, since = self._images, self._evidence, self._since
            recent = np.array(self._recent)
        score, distance = map(float, np.median(recent, axis=0)) if images else (None, None)
        return DriftState(
            images=images,
            evidence=float(evidence.mean()),
            threshold=ALARM_LEVEL,
            drifted=since is not None,
            since=since,
            what=None if since is None else _DIRECTIONS[int(evidence.sum(axis=(1, 2)).argmax())],
            score=score,
            normal_score=self._normal[0],
            distance=distance,
            normal_distance=self._normal[1],
        )


def limit_share_beyond(count: int, rank: int, risk: float) -> float:
    """Upper limit of the share of normal images above the ``rank``-th smallest of ``count`` calibration images.

    Args:
        count: Number of calibration images.
        rank: Rank of the quantile, from 1 to ``count``.
        risk: Probability that the share is larger than the limit.

    Returns:
        The limit, in [0, 1], to within 1e-9. Source: Clopper and Pearson 1934.
    """
    # The share is larger than b with the probability that at most count - rank of count images fall beyond a quantile of
    # share b: a binomial sum, which falls with b.
    beyond = np.arange(count - rank + 1)
    log_choices = np.array([lgamma(count + 1) - lgamma(i + 1) - lgamma(count - i + 1) for i in beyond])
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        share = (low + high) / 2
        if np.exp(log_choices + beyond * np.log(share) + (count - beyond) * np.log1p(-share)).sum() > risk:
            low = share
        else:
            high = share
    return high
