"""Start and end a real BentoML server."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

SERVICE = "patchcore_plugin.bento.service:PatchcoreService"
BENTOML = [sys.executable, "-m", "bentoml"]
SERVE = [*BENTOML, "serve", SERVICE]


class Server(str):
    """A running server: its URL, process and log."""

    process: subprocess.Popen
    log: Path


@contextmanager
def bentoml_serve(command, folder, cwd=None, **environment):
    """Run a server on a free loopback port; a RuntimeError with its log if it never becomes ready. Logs to ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}")
    server.log = folder / f"serve-{port}.log"
    with server.log.open("wb") as output:
        server.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd or folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while not _ready(server):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(server.log.read_text(errors="replace"))
            time.sleep(0.2)
        yield server
    finally:
        if server.process.poll() is None:
            for member in [server.process, *psutil.Process(server.process.pid).children(recursive=True)]:
                member.kill()
        server.process.wait(30)


def _ready(url) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).is_success
    except httpx.TransportError:
        return False
