"""Threads of FAISS, OpenVINO and torch: none hangs in a forked process, and no more of them work than were asked for."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training import EMBEDDINGS

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")

IN_A_CHILD = """
import multiprocessing, os, sys
import numpy as np

def in_a_child(function, seconds=60):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function()))
    child.start()
    sender.close()
    if not receiver.poll(seconds):
        child.kill()
        print("the child hangs", file=sys.stderr)
        os._exit(1)
    return receiver.recv()

embeddings = np.load(sys.argv[1])[:1500]
"""


def run(code: str, *arguments: object) -> None:
    """Run code in a process of its own, in which OpenMP has two threads: with one it would start none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", code, EMBEDDINGS, *arguments]
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert not result.returncode, result.stderr


@needs_fork
def test_bank_in_a_forked_process():
    """One of the parent, which has searched, and a new one: both answer as in the parent."""
    run(
        IN_A_CHILD
        + """
from patchcore_plugin.memory_bank import MemoryBank

vectors, grids = embeddings[::2], embeddings[1:1025].reshape(1, 32, 32, -1)

def make(index, storage, threads):
    bank = MemoryBank(vectors, index, storage, num_neighbors=3)
    bank.threads = threads
    return bank

def answers(bank):
    return [bank.search(embeddings[1::2], 2)[0], bank.search(embeddings[:3])[0], bank.nearest(grids)[0], bank.vectors]

kinds = [("flat", "float32"), ("flat", "int8"), ("bfloat16", "float32"), ("ivf", "float16"), ("hnsw", "float32")]
kinds.append(("reduced", "float32"))
banks = {(*kind, threads): make(*kind, threads) for kind in kinds for threads in (None, 2)}
expected = {arguments: answers(bank) for arguments, bank in banks.items()}
kept = in_a_child(lambda: {arguments: answers(bank) for arguments, bank in banks.items()})
new = in_a_child(lambda: {arguments: answers(make(*arguments)) for arguments in banks})
for arguments in banks:
    for ours, theirs, others in zip(expected[arguments], kept[arguments], new[arguments], strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        if arguments[0] in ("flat", "bfloat16"):
            np.testing.assert_allclose(others, ours, rtol=1e-5)
"""
    )


@needs_fork
def test_coreset_in_a_forked_process():
    run(
        IN_A_CHILD
        + """
from patchcore_plugin.coreset import GreedyCoreset

fit = lambda: GreedyCoreset(size=20, progress=False).fit(embeddings).tolist()
assert fit() == in_a_child(fit)
"""
    )


@needs_fork
def test_runtime_in_a_forked_process(bundle, tmp_path):
    """One of the parent says at once that it is the parent's; a new one works, though the parent has scored."""
    run(
        IN_A_CHILD
        + """
from patchcore_plugin import PatchcoreRuntime

image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

def refusal(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)

for mode in ("latency", "throughput", "auto"):
    load = lambda: PatchcoreRuntime.load(sys.argv[2], mode=mode, threads=2, cache=False)
    runtime = load()
    (expected,) = (prediction.score for prediction in runtime.predict([image]))
    for call in (lambda: runtime.predict([image]), lambda: runtime.explain(image), lambda: runtime.embed([image])):
        name, message = in_a_child(lambda: refusal(call))
        assert name == "OtherProcessError", (name, message)
        assert f"loaded in another process ({os.getpid()})" in message and "PatchcoreRuntime.load in this one" in message

    def replaced():
        globals()["runtime"] = load()  # nothing refers to the parent's any more
        return runtime.predict([image])[0].score, runtime.explain(image)[0].score

    assert in_a_child(replaced) == (expected, expected)
    pid = os.fork()
    if not pid:
        sys.exit(0)  # an end that destroys everything
    assert os.waitpid(pid, 0)[1] == 0
    assert runtime.predict([image])[0].score == expected
""",
        bundle,
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not say what each thread has done")
def test_one_thread_is_one_thread():
    """However FAISS searches, one thread at a time is busy: that of the search, or the caller's with the distances."""
    run(
        """
import contextlib, sys, threading
from pathlib import Path
import numpy as np
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.scoring import ScoreRule

real = np.load(sys.argv[1])
vectors = np.concatenate([real, real + 0.25])
grids = real[:1024].reshape(1, 32, 32, -1) + 0.1

def ticks():
    busy = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            busy[task.name] = sum(map(int, (task / "stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return busy

def shares(work, least=40):
    work()
    before, used = ticks(), {}
    while sum(used.values()) < least:
        work()
        used = {name: busy - before.get(name, 0) for name, busy in ticks().items()}
    caller = used.pop(str(threading.get_native_id()))
    busiest, *others = sorted(used.values(), reverse=True)
    return caller, busiest, sum(others)

def check(name, work):
    caller, busiest, others = shares(work)
    assert others <= 0.1 * (caller + busiest), (name, caller, busiest, others)
    assert min(caller, busiest) <= 0.7 * max(caller, busiest), (name, caller, busiest, others)

bank = MemoryBank(vectors)
bank.threads = 1
check("flat", lambda: bank.search(grids.reshape(1024, -1)))
check("scores of flat", lambda: bank.score(grids, ScoreRule()))
check("neighbors", lambda: bank.find_neighbors(5))
bank = MemoryBank(vectors, "ivf")
bank.threads = 1
check("more than there are in the nearest cells", lambda: bank.search(grids.reshape(1024, -1)[:200], 900, width=1))
check("a choice", lambda: choose(vectors[::8], grids, ScoreRule(), "flat", threads=1))
"""
    )
