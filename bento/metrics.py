"""Prometheus metrics, beside BentoML's own at /metrics."""

from __future__ import annotations

_TENTHS = tuple(step / 20 for step in range(1, 21))
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """What is counted. To be made once in a process, after BentoML has named the folder that processes share."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram  # sees PROMETHEUS_MULTIPROC_DIR only when imported here

        self.scores = Histogram(
            "patchcore_normalized_score", "Image scores; the threshold is at 0.5", ["model"], buckets=_TENTHS
        )
        self.verdicts = Counter("patchcore_verdicts", "Images by verdict", ["model", "verdict"])
        self.stages = Histogram("patchcore_stage_seconds", "Time of each stage of an image", ["stage"], buckets=_SECONDS)
        self.images = Histogram(
            "patchcore_request_images", "Images of a request", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        )
        self.queue = Gauge("patchcore_requests_inside", "Requests being worked on or waiting", multiprocess_mode="livesum")
        self.loads = Counter("patchcore_model_loads", "Bundles loaded, refused or dropped", ["model", "result"])
        self.rejected = Counter("patchcore_rejected", "Requests and images without an answer, by code", ["code"])
        # Each process watches its own share of the images: what is shown is the one that is surest.
        self.drifted = Gauge(
            "patchcore_drifted",
            "1 while production counts as drifted, else 0",
            ["model"],
            multiprocess_mode="livemax",
        )
        self.drift = Gauge(
            "patchcore_drift_evidence",
            "Logarithm of the evidence of drift, in units of the threshold's",
            ["model"],
            multiprocess_mode="livemax",
        )
