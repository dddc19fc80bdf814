"""The compiled network's surroundings."""

import subprocess
import sys

FIRST_USE = """
import threading, openvino as ov
import patchcore_plugin.runtime.network

ready = threading.Barrier(2)

def use():
    ready.wait()
    ov.Type.u8.to_dtype()

threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_two_threads_come_first():
    """OpenVINO by itself hangs in one process of four, as found when a runtime's first two images came at once."""
    for _ in range(12):
        subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=60)
