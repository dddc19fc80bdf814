"""torch's threads on a CPU that other programs use too."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_PROBE_VALUES = 2**17  # of an operation that torch shares among its threads
_PROBE_SECONDS = 0.05
_WAITING = 1.5  # times as many operations by one thread as by all: what shows that they wait
_MANY_VALUES = 2**20  # of a matrix; work on fewer is soon done, even by threads that wait for each other


@contextmanager
def threads_for(points: torch.Tensor) -> Iterator[None]:
    """Within this context torch computes with one thread, where its threads would mostly wait for each other.

    All of torch's threads end an operation together. Where other programs use the cores, one of them often does not run, and
    each of thousands of short operations takes as long as until it does. Threads are compared with one thread by a few
    operations; on a machine that has its cores for itself, nothing changes.

    Args:
        points: Matrix that is worked on.
    """
    threads = torch.get_num_threads()
    if points.device.type != "cpu" or threads == 1 or points.numel() < _MANY_VALUES:
        yield
        return
    together = _operations_per_second()
    torch.set_num_threads(1)
    try:
        alone = _operations_per_second()
        if alone < _WAITING * together:
            torch.set_num_threads(threads)
        else:
            logger.info("Other programs use the CPU: the coreset is computed by one thread instead of %d.", threads)
        yield
    finally:
        torch.set_num_threads(threads)


def _operations_per_second() -> float:
    left, right = torch.zeros(2, _PROBE_VALUES)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_SECONDS:
        torch.minimum(left, right, out=left)
        done += 1
    return done / (time.perf_counter() - started)
