"""Drift of production, told from what the service answers."""

from __future__ import annotations

import logging
import threading
from math import log10
from typing import TYPE_CHECKING

from patchcore_plugin.scoring.drift import ALARM_LEVEL, DriftMonitor

from .schemas import Drift, Drifts, ModelDrift

if TYPE_CHECKING:
    from patchcore_plugin.runtime import Prediction

    from .metrics import Metrics

logger = logging.getLogger("patchcore.service")


class Watch:
    """A monitor for each model that has answered; another version of it starts anew.

    It stands in the process that answers, not beside the network, which may be in another one.

    Args:
        metrics: Where the evidence is shown.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._monitors: dict[str, tuple[str, DriftMonitor | None]] = {}
        self._lock = threading.Lock()

    def feed(self, model: str, version: str, prediction: Prediction) -> None:
        """Take an answer into account."""
        with self._lock:
            known, monitor = self._monitors.get(model, (None, None))
            if known != version:
                calibration = prediction.manifest.calibration
                monitor = None if calibration is None else DriftMonitor(calibration)
                self._monitors[model] = version, monitor
        if monitor is None:
            return
        if monitor.update(prediction.score, prediction.mean_distance):
            logger.warning("Production has drifted from what the model %s was calibrated on: %s", model, monitor.state.what)
        self._metrics.drifted.labels(model=model).set(monitor.drifted)
        self._metrics.drift.labels(model=model).set(log10(max(monitor.evidence, 1)) / log10(ALARM_LEVEL))

    def describe(self) -> Drifts:
        """What the monitors have found."""
        with self._lock:
            monitors = dict(self._monitors)
        return Drifts(
            models=[
                ModelDrift(model=model, version=version, drift=None if monitor is None else Drift(**vars(monitor.state)))
                for model, (version, monitor) in monitors.items()
            ]
        )
