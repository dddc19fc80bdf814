"""Start and end a real BentoML server."""

import os
import socket
import subprocess
import time
from contextlib import contextmanager

import httpx
import psutil

SERVICE = "patchcore_plugin.bento.service:PatchcoreService"


@contextmanager
def bentoml_serve(command, folder, cwd=None, **environment):
    """Run a server on a free loopback port; a RuntimeError with its log if it never becomes ready. Logs to ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"serve-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd or folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _ready(url):
            text = log.read_text(errors="replace")
            if process.poll() is not None or time.monotonic() > deadline or "BundleError" in text:
                raise RuntimeError(text)
            time.sleep(0.2)
        yield url
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait(30)


def _ready(url) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).is_success
    except httpx.TransportError:
        return False
