"""The threads on which FAISS works for a memory bank."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import faiss

from patchcore_plugin.checks import check_number
from patchcore_plugin.cpu import outside_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Result = TypeVar("Result")


class Threads:
    """The threads of a bank's searches.

    OpenMP counts threads for each thread that starts some: the number holds for one call, and for nobody else's.

    Args:
        count: Number of threads that work at the same time; None works on as many as OpenMP is told to.

    Raises:
        UsageError: If ``count`` is below 1.
    """

    def __init__(self, count: int | None) -> None:
        check_number("threads", count, 1, whole=True, optional=True, hint="None leaves threads to FAISS.")
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()  # threads do not survive a fork: the forked process starts its own ones

    def together(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call one function of FAISS with all threads."""
        return outside_fork(_on_threads, self.count, function, *arguments)

    def alone(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call one function of FAISS with one thread. OpenMP's others would spin for a while afterwards."""
        return outside_fork(_on_threads, None if self.count is None else 1, function, *arguments)

    def each(self, function: Callable[..., Result], parts: Iterable[object]) -> list[Result]:
        """Call one function of FAISS for each part, each with one thread, and as many at the same time as threads."""
        if self.count is None:
            return [outside_fork(function, part) for part in parts]
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(self.count, "memory-bank", initializer=faiss.omp_set_num_threads, initargs=(1,))
            self._process = os.getpid()  # last: until then, other threads must not take the pool of before a fork
        return list(self._pool.map(function, parts))


def _on_threads(count: int | None, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function on a number of OpenMP's threads; None leaves the number as it is."""
    before = faiss.omp_get_max_threads()
    if count in (None, before):
        return function(*arguments)
    faiss.omp_set_num_threads(count)
    try:
        return function(*arguments)
    finally:
        faiss.omp_set_num_threads(before)
