"""The CPU of this machine: its cores and instructions, OpenVINO's options for it, and native threads after a fork."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    Result = TypeVar("Result")

_IMPORTED_IN = os.getpid()
_NETWORK_OWNERS: weakref.WeakSet[object] = weakref.WeakSet()

Mode = Literal["latency", "throughput"]
"""How work is spread over threads: one image with all threads, or as many images at once as threads."""


_INSTRUCTION_SETS = {
    "x86": {
        "AVX2": {"avx2"},
        "AVX-512": {"avx512bw", "avx512skx"},
        "VNNI": {"avx512vnni", "avxvnni", "avx512clx", "avx512icl", "avx512spr"},
        "bfloat16": {"avx512bf16", "amxbf16", "avx512spr"},
        "AMX": {"amxtile"},
    },
    "ARM": {
        "NEON": {"asimd", "neon"},
        "float16": {"asimdhp"},
        "dot products": {"asimddp"},
        "bfloat16": {"bf16"},
        "SVE": {"sve"},
    },
}
"""Instruction sets that the speed of scoring depends on, each with its names in Linux and in NumPy."""


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_limit() -> float | None:
    """Number of cores that a Linux container may use, which :func:`cores` does not count; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)  # an error where the quota is the word max
    return None


def instruction_sets() -> dict[str, bool | None]:
    """Whether this CPU has the instruction sets that the speed of scoring depends on; None where the system does not say.

    Linux says it. Elsewhere NumPy, which has to know it for itself, says most.
    """
    kind = "ARM" if platform.machine().lower().startswith(("arm", "aarch")) else "x86"
    here: dict[str, bool] = {}
    with suppress(ImportError):
        from numpy._core._multiarray_umath import __cpu_features__

        here = {name.lower().replace("_", ""): has for name, has in __cpu_features__.items()}
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        all_names = set().union(*_INSTRUCTION_SETS[kind].values())
        if flags:
            here = dict.fromkeys(all_names, False) | dict.fromkeys(flags[1].replace("_", "").split(), True)
    return {
        title: (any(here.get(name) for name in names) if names & here.keys() else None)
        for title, names in _INSTRUCTION_SETS[kind].items()
    }


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
