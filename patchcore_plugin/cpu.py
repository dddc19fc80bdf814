"""The CPU of this machine: its cores, its arithmetic, and OpenVINO's options for it."""

from __future__ import annotations

import os
from typing import Literal

Mode = Literal["latency", "throughput"]
"""How work is spread over threads: one image with all threads, or as many images at once as threads."""


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_options(mode: Mode, threads: int) -> dict[str, object]:
    """Give OpenVINO's properties for a mode of work.

    Args:
        mode: How work is spread over threads.
        threads: Number of threads.
    """
    streams = 1 if mode == "latency" else threads
    return {"PERFORMANCE_HINT": mode.upper(), "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
