"""torch's number of threads while a coreset is computed."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from patchcore_plugin.coreset import GreedyCoreset, threads
from patchcore_plugin.coreset.threads import threads_for

BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    return torch.randn((2**18, 64), generator=torch.Generator().manual_seed(0))


@contextmanager
def busy_processes(count: int):
    """Processes that keep the cores busy, until the context ends and for a minute at most."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def threads_within(points: torch.Tensor) -> int:
    with threads_for(points):
        return torch.get_num_threads()


def test_one_thread_where_other_programs_use_the_cores(two_threads, many):
    import psutil

    with busy_processes(2 * psutil.cpu_count()):
        assert 1 in [threads_within(many) for _ in range(10)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("together", "alone", "taken"), [(100, 149, 2), (100, 151, 1), (200, 100, 2)])
def test_one_thread_where_it_does_more(two_threads, many, monkeypatch, together, alone, taken):
    monkeypatch.setattr(threads, "_operations_per_second", lambda: alone if torch.get_num_threads() == 1 else together)
    assert threads_within(many) == taken
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(many):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_little_work_and_one_thread_are_not_measured(two_threads, many, monkeypatch):
    monkeypatch.setattr(threads, "_operations_per_second", lambda: pytest.fail("was measured"))
    assert threads_within(many[:100]) == 2
    torch.set_num_threads(1)
    assert threads_within(many) == 1


def test_same_picks(two_threads, many, monkeypatch):
    picks = []
    for rates in ({1: 1, 2: 2}, {1: 2, 2: 1}):
        monkeypatch.setattr(threads, "_operations_per_second", lambda rates=rates: rates[torch.get_num_threads()])
        picks.append(GreedyCoreset(size=50, progress=False).fit(many))
    assert torch.equal(*picks)
