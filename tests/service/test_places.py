"""Places: as much work at once as there are places, whether or not its requests still wait for it."""

import asyncio
import threading

import anyio
import pytest
from helpers.http import wait_for
from patchcore_plugin.bento.places import Places
from patchcore_plugin.bento.problems import ProblemError


class Work:
    """Work that goes on until it is let go.

    Attributes:
        running: Number of its calls that go on now.
        most: Largest number of them so far.
    """

    def __init__(self) -> None:
        self.running, self.most, self._lock, self._end = 0, 0, threading.Lock(), threading.Event()

    def __call__(self, result: int = 0) -> int:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self._end.wait(30)
        with self._lock:
            self.running -= 1
        return 1 // result

    def let_go(self) -> None:
        self._end.set()


async def started(work: Work, count: int) -> None:
    while work.running < count:
        await anyio.sleep(0.005)


def test_place_is_taken_until_its_work_has_ended():
    async def check() -> None:
        places, work = Places(1), Work()
        with anyio.move_on_after(0.1):
            await places.run(work)
        assert work.running == 1, "a thread cannot be stopped"
        with pytest.raises(ProblemError, match="All places are taken") as caught:
            await places.run(work)
        assert (caught.value.code, caught.value.headers) == ("busy", {"Retry-After": "5"})
        work.let_go()
        await anyio.to_thread.run_sync(wait_for, lambda: not work.running)
        await anyio.sleep(0.05)
        assert await places.run(work, 1) == 1
        assert work.most == 1

    asyncio.run(check())


def test_waiting_requests_may_end():
    """They leave nothing behind, and their work never begins."""

    async def check() -> None:
        places, work = Places(2), Work()
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(places.run, work, 1)
            await started(work, 2)
            for _ in range(20):
                with anyio.move_on_after(0.005):
                    await places.run(work, 1)
            work.let_go()
        assert work.most == 2
        assert [await places.run(work, 1) for _ in range(5)] == [1] * 5

    asyncio.run(check())


def test_requests_that_end_at_any_moment():
    async def check() -> None:
        places, ended = Places(3), []
        for number in range(300):
            with anyio.move_on_after(number % 30 / 10_000):
                await places.run(ended.append, number)
        await anyio.sleep(0.1)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(places.run, ended.append, -1)
        assert ended.count(-1) == 3

    asyncio.run(check())


def test_errors_of_the_work_are_raised():
    async def check() -> None:
        places, work = Places(1), Work()
        work.let_go()
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await places.run(work, 0)

    asyncio.run(check())
