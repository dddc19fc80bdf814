"""Has production moved away from the images that the model was calibrated on? Light, camera, focus, material.

Every image bets against the hypothesis that nothing has moved. What is watched are image scores and mean distances (the mean
of the anomaly map), each in both directions: blur may well make scores smaller. For each of them and for several quantiles
of the calibration, one watches the event that an image lies beyond the quantile. Without drift its probability is at most

    p0 = d + (1 - d) b,

where d is the share of production's images that may be defective, and score whatever they like (0.1), and b bounds the share
of normal images beyond that quantile. A quantile of n calibration images is not that of production: the share beyond the
k-th smallest follows Beta(n + 1 - k, k), and b is its upper limit (Clopper and Pearson 1934). All of these limits hold
together for 999 of 1000 draws of the calibration images. Without both allowances, any fixed calibration set would be found
out to be finite, and any defect to be drift, by enough images.

A bet of the share w pays e = 1 + w (1 - p0) / p0 where the event happens, and e = 1 - w where not: as long as its
probability is at most p0, whatever came before, e is at most 1 in the mean. Products of bets that began at every image so
far are summed up, R = (1 + R) e (Shiryaev and Roberts), and the evidence is the mean of the R of all bets. Without drift it
is at most t in the mean at the t-th image, however the bets depend on each other; hence it reaches THRESHOLD for the first
time after at least as many images in the mean, and within N images with a probability of at most N / THRESHOLD.
Source: Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", arXiv 2203.03532.

Images that resemble their neighbours in time (a new batch of material) are what is called drift here.
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

THRESHOLD = 1e6
"""Evidence from which on production has drifted: without drift, reached once in so many images at most, in the mean."""

DEFECTS = 0.1
"""Share of defective images that is no drift."""

WINDOW = 50
"""Latest images that the state describes."""

_QUANTILES = (0.5, 0.75, 0.9)
_STAKES = (0.5, 0.9)
_UNLUCKY = 1e-3  # share of calibration sets for which some limit does not hold
_NAMES = ("scores are larger", "scores are smaller", "distances are larger", "distances are smaller")


@dataclass(frozen=True)
class DriftState:
    """What a monitor has found so far.

    Attributes:
        images: How many it was fed with.
        evidence: Against the hypothesis that nothing has moved; around 1 without drift.
        threshold: Evidence that counts as drift.
        drifted: Whether it was reached, and has not fallen below the threshold's square root since.
        since: When it was reached; None without drift.
        what: Which of the four the strongest evidence speaks of, such as ``"scores are larger"``; None without drift.
        score: Median image score of the latest 50 images; None before the first.
        normal_score: The calibration's.
        distance: Median of the latest 50 images' mean distances; None before the first.
        normal_distance: The calibration's.
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
    """Compares images, one after the other, with the calibration. Safe to call from several threads.

    Args:
        calibration: That of the bundle. With 100 images, a change that moves all images beyond the calibration's 90 %
            quantile is told after 16 of them; with 30, after 24.

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
        # The smaller side is the larger one of negated values.
        sides = [scores, -scores[::-1], means, -means[::-1]]
        self._beyond = np.array([[side[rank - 1] for rank in ranks] for side in sides])  # (4, quantiles)
        confidence = _UNLUCKY / self._beyond.size
        share = np.array([_share_beyond(count, rank, confidence) for rank in ranks])
        limit = (DEFECTS + (1 - DEFECTS) * share)[:, None]
        stakes = np.array(_STAKES)
        self._lost = 1 - stakes  # (stakes,)
        self._won = 1 + stakes * (1 - limit) / limit  # (quantiles, stakes)
        self._evidence = np.zeros((*self._beyond.shape, len(stakes)))
        # No single bet can say more than that there is drift: afterwards the way back is short.
        self._most = THRESHOLD * self._evidence.size
        self._normal = float(np.median(scores)), float(np.median(means))
        self._latest: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._images = 0
        self._since: datetime | None = None
        self._lock = threading.Lock()

    def update(self, score: float, distance: float) -> bool:
        """Take an image's score and mean distance into account; True if production counts as drifted from it on."""
        values = np.array([score, -score, distance, -distance])
        won = (values[:, None] > self._beyond)[..., None]
        with self._lock:
            self._images += 1
            self._latest.append((score, distance))
            self._evidence = np.minimum((1 + self._evidence) * np.where(won, self._won, self._lost), self._most)
            evidence = self._evidence.mean()
            if self._since is not None:
                if evidence < THRESHOLD**0.5:
                    self._since = None
            elif evidence >= THRESHOLD:
                self._since = datetime.now(timezone.utc)
                return True
        return False

    @property
    def drifted(self) -> bool:
        """Whether production counts as drifted."""
        return self._since is not None

    @property
    def evidence(self) -> float:
        """Evidence for it, to be compared with ``THRESHOLD``."""
        return float(self._evidence.mean())

    @property
    def state(self) -> DriftState:
        """What was found so far."""
        with self._lock:
            images, evidence, since = self._images, self._evidence, self._since
            latest = np.array(self._latest)
        score, distance = map(float, np.median(latest, axis=0)) if images else (None, None)
        return DriftState(
            images=images,
            evidence=float(evidence.mean()),
            threshold=THRESHOLD,
            drifted=since is not None,
            since=since,
            what=None if since is None else _NAMES[int(evidence.sum(axis=(1, 2)).argmax())],
            score=score,
            normal_score=self._normal[0],
            distance=distance,
            normal_distance=self._normal[1],
        )


def _share_beyond(count: int, rank: int, unlucky: float) -> float:
    """Upper limit of the share of normal images above the ``rank``-th smallest of ``count`` calibration images.

    Args:
        count: Calibration images.
        rank: From 1 to ``count``.
        unlucky: Probability that the share is larger than the limit.
    """
    # It is larger than b as probably as at most count - rank of count images fall beyond a quantile whose share is b.
    fewer = np.arange(count - rank + 1)
    choices = np.array([lgamma(count + 1) - lgamma(i + 1) - lgamma(count - i + 1) for i in fewer])
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        share = (low + high) / 2
        if np.exp(choices + fewer * np.log(share) + (count - fewer) * np.log1p(-share)).sum() > unlucky:
            low = share
        else:
            high = share
    return high
