"""What this machine's CPU offers, and how OpenVINO is told to use it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_options(mode: Literal["latency", "throughput"], threads: int) -> dict[str, object]:
    """OpenVINO's properties for one image with all threads, or for as many images as threads."""
    streams = 1 if mode == "latency" else threads
    return {"PERFORMANCE_HINT": mode.upper(), "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
