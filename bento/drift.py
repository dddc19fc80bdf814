"""Drift of production, found from what the service answers."""

from __future__ import annotations

import threading
from math import log10
from typing import TYPE_CHECKING

from patchcore_plugin.scoring.drift import ALARM_LEVEL, DriftMonitor

from .logs import logger
from .schemas import DriftReport, DriftStatus, ModelDrift

if TYPE_CHECKING:
    from .metrics import Metrics
    from .scorer import Scored


class DriftMonitors:
    """One drift monitor for each model that has answered. A new version of a model begins with a new monitor.

    The monitors belong to the process that answers, also where another process scores.

    Args:
        metrics: Metrics that show the evidence.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._monitors: dict[str, tuple[str, DriftMonitor | None]] = {}  # by model: version and monitor
        self._lock = threading.Lock()

    def update(self, scored: Scored) -> None:
        """Take an image of production into account."""
        model, prediction = scored.model, scored.prediction
        monitor = self._monitor_of(scored)
        if monitor is None:
            return
        if monitor.update(prediction.score, prediction.mean_distance):
            logger.warning("Production has drifted from what the model %s was calibrated on: %s", model, monitor.state.what)
        self._metrics.drifted.labels(model=model).set(monitor.drifted)
        self._metrics.drift_evidence.labels(model=model).set(log10(max(monitor.evidence, 1)) / log10(ALARM_LEVEL))

    def _monitor_of(self, scored: Scored) -> DriftMonitor | None:
        """The model's monitor; None if the model has no calibration."""
        with self._lock:
            version, monitor = self._monitors.get(scored.model, (None, None))
            if version != scored.version:
                calibration = scored.prediction.manifest.calibration
                monitor = None if calibration is None else DriftMonitor(calibration)
                self._monitors[scored.model] = scored.version, monitor
        return monitor

    def report(self) -> DriftReport:
        """The state of all monitors."""
        with self._lock:
            monitors = dict(self._monitors)
        return DriftReport(
            models=[
                ModelDrift(model=model, version=version, drift=monitor and DriftStatus.model_validate(monitor.state))
                for model, (version, monitor) in monitors.items()
            ]
        )
