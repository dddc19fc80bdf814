"""The CPU of this machine: its cores, its arithmetic, OpenVINO's options for it, and native threads after a fork."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Result = TypeVar("Result")

_IMPORTED_IN = os.getpid()
_NETWORK_OWNERS: weakref.WeakSet[object] = weakref.WeakSet()

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


def outside_fork(function: Callable[..., Result], *arguments: object, **options: object) -> Result:
    """Call a function that computes with OpenMP, as those of FAISS and torch do, without a hang in a forked process.

    A thread that has used OpenMP's threads before a fork waits for them for ever after it. In the forked process that can
    be the main thread alone, and a new thread starts new ones: there the function is called.

    Args:
        function: What to call.
        *arguments: Its arguments.
        **options: Its keyword arguments.

    Returns:
        What the function returns.
    """
    if os.getpid() == _IMPORTED_IN or threading.current_thread() is not threading.main_thread():
        return function(*arguments, **options)
    with ThreadPoolExecutor(1, "outside-fork") as pool:
        return pool.submit(function, *arguments, **options).result()


def keep_after_fork(owner: object) -> None:
    """Keep what holds networks of OpenVINO for as long as a forked process lives.

    The end of a network waits for its threads, which a fork does not copy.

    Args:
        owner: The object; any that can be referred to weakly.
    """
    _NETWORK_OWNERS.add(owner)


def _keep_owners() -> None:
    for owner in list(_NETWORK_OWNERS):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))  # a mere reference would end with the interpreter


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_owners)
