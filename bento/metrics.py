"""Prometheus metrics of the service.

BentoML's own are off: they keep every path that a client sends.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SCORE_BUCKETS = tuple(step / 20 for step in range(1, 21))
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
IMAGES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one process.

    Make them once in a process, after BentoML has named the folder that its processes share.

    Args:
        registry: Registry to add the metrics to; a new one by default.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # At its import, the package reads the name of the shared folder from the environment.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry or CollectorRegistry()
        add = {"registry": self._registry}
        self._answers = Counter("patchcore_requests", "Requests by route and status", ["route", "status"], **add)
        self._seconds = Histogram(
            "patchcore_request_seconds", "Time of a request, by route", ["route"], buckets=SECONDS_BUCKETS, **add
        )
        self.scores = Histogram(
            "patchcore_normalized_score", "Image scores; the threshold is at 0.5", ["model"], buckets=SCORE_BUCKETS, **add
        )
        self.verdicts = Counter("patchcore_verdicts", "Images by verdict", ["model", "verdict"], **add)
        self.stages = Histogram(
            "patchcore_stage_seconds", "Time of each stage of an image", ["stage"], buckets=SECONDS_BUCKETS, **add
        )
        self.images = Histogram("patchcore_request_images", "Images of a request", buckets=IMAGES_BUCKETS, **add)
        self.requests = Gauge("patchcore_requests_inside", "Requests in work or waiting", multiprocess_mode="livesum", **add)
        self.loads = Counter(
            "patchcore_model_loads", "Bundles that were loaded, refused or dropped", ["model", "result"], **add
        )
        self.problems = Counter("patchcore_rejected", "Requests and images without an answer, by code", ["code"], **add)
        self.record_lost = Counter(
            "patchcore_record_lost",
            "Answers, or images of them, that could not be recorded",
            ["what"],
            **add,
        )
        self.record_failing = Gauge(
            "patchcore_record_failing", "1 while the record cannot be written, else 0", multiprocess_mode="livemax", **add
        )
        # Each process sees its own share of the images. The largest value is that of the process with the most evidence.
        self.drifted = Gauge(
            "patchcore_drifted", "1 while production has drifted, else 0", ["model"], multiprocess_mode="livemax", **add
        )
        self.drift_evidence = Gauge(
            "patchcore_drift_evidence",
            "Logarithm of the evidence of drift; 1 is the alarm level",
            ["model"],
            multiprocess_mode="livemax",
            **add,
        )

        self.events = Counter("patchcore_webhook_events", "Events of the webhook, by what happened", ["result"], **add)
        self.events_waiting = Gauge(  # the process that delivers knows it
            "patchcore_webhook_waiting", "Events in the webhook's queue", multiprocess_mode="livemax", **add
        )

    def count_request(self, route: str, status: int | None, seconds: float) -> None:
        """Count a request.

        Args:
            route: One of few names: each one is kept for ever.
            status: Status of the answer; None if there was none.
            seconds: Its time.
        """
        self._answers.labels(route=route, status=status or "none").inc()
        self._seconds.labels(route=route).observe(seconds)

    def text(self) -> bytes:
        """The metrics of all processes in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # the folder that the processes share
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
