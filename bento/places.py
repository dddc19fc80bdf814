"""Places for images in work: their number bounds the threads and the memory of a process."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread

from .problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class Places:
    """Runs work in threads, each in a place of its own.

    A request may end before its work, at its time-out or when its client leaves. A thread cannot be stopped: its place is
    free again when its work has ended.

    Args:
        count: Number of places.
    """

    def __init__(self, count: int) -> None:
        self._free = anyio.CapacityLimiter(count)
        self._threads = anyio.CapacityLimiter(math.inf)  # the places limit them
        self._left: set[Future[None]] = set()

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run work in a thread, as soon as a place is free.

        Raises:
            ProblemError: If all places are taken by work for requests that have ended; when one is free is not known.
        """
        if len(self._left) >= self._free.total_tokens:
            detail = "All places are taken by images of requests that have ended; try again in a few seconds."
            raise ProblemError("busy", detail, {"Retry-After": "5"})
        place: Future[None] = Future()
        await self._free.acquire_on_behalf_of(place)
        loop = asyncio.get_running_loop()

        def work_and_leave() -> Result | None:
            if not place.set_running_or_notify_cancel():
                return None  # the request ended before
            try:
                return work(*arguments)
            finally:
                with suppress(RuntimeError):  # the process ends, and the loop is closed
                    loop.call_soon_threadsafe(self._leave, place)

        try:
            return await anyio.to_thread.run_sync(work_and_leave, limiter=self._threads, abandon_on_cancel=True)
        finally:
            if place.cancel():
                self._free.release_on_behalf_of(place)
            elif not place.done():
                self._left.add(place)

    def _leave(self, place: Future[None]) -> None:
        place.set_result(None)
        self._free.release_on_behalf_of(place)
        self._left.discard(place)
