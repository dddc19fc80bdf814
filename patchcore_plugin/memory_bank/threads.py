"""The threads on which FAISS works for a memory bank."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import faiss

from patchcore_plugin.checks import check_number
from patchcore_plugin.cpu import outside_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Result = TypeVar("Result")


class _Pools(NamedTuple):
    """Threads of one process.

    Attributes:
        process: Number of the process.
        leader: One thread, from which OpenMP starts the others.
        alone: Threads on which OpenMP starts no others.
    """

    process: int
    leader: ThreadPoolExecutor
    alone: ThreadPoolExecutor


class Threads:
    """Threads of a bank's own. A process that is forked starts its own ones, as threads do not survive a fork.

    OpenMP counts threads for each thread that starts some: the numbers set here are nobody else's.

    Args:
        count: Number of threads that work at the same time; None works on the caller's thread, from which FAISS starts as
            many as OpenMP is told to.

    Raises:
        UsageError: If ``count`` is below 1.
    """

    def __init__(self, count: int | None) -> None:
        check_number("threads", count, 1, whole=True, optional=True, hint="None leaves threads to FAISS.")
        self.count = count
        self._pools: _Pools | None = None

    def together(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call one function of FAISS with all threads."""
        if self.count is None:
            return outside_fork(function, *arguments)
        return self._own().leader.submit(function, *arguments).result()

    def alone(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call one function of FAISS with one thread. OpenMP's others would spin for a while afterwards."""
        if self.count is None:
            return outside_fork(function, *arguments)
        return self._own().alone.submit(function, *arguments).result()

    def each(self, function: Callable[..., Result], parts: Iterable[object]) -> list[Result]:
        """Call one function of FAISS for each part, each with one thread, and as many at the same time as threads."""
        if self.count is None:
            return [outside_fork(function, part) for part in parts]
        return list(self._own().alone.map(function, parts))

    def _own(self) -> _Pools:
        pools = self._pools
        if pools is None or pools.process != os.getpid():
            one, many = (
                ThreadPoolExecutor(size, "memory-bank", initializer=faiss.omp_set_num_threads, initargs=(limit,))
                for size, limit in ((1, self.count), (self.count, 1))
            )
            pools = self._pools = _Pools(os.getpid(), one, many)
        return pools
