"""The service for tests: a real BentoML server, run as the demo runs its own, or the application in this process."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from patchcore_plugin.operations.serving import BENTOML, SERVE, SERVICE, run_server

if TYPE_CHECKING:
    import subprocess

    from prometheus_client import CollectorRegistry

__all__ = ["BENTOML", "SERVE", "SERVICE", "app_server", "bentoml_serve", "serve_app"]


class Server(str):
    """A running server: its URL and client; process and log of a BentoML server; metrics of one in this process."""

    client: httpx.Client
    process: subprocess.Popen
    log: Path
    registry: CollectorRegistry

    def children(self) -> list[psutil.Process]:
        """All processes below the server's own."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def bentoml_serve(command, folder, cwd=None, **environment):
    """Run a BentoML server that logs to ``folder``, in ``cwd`` or there."""
    log = Path(folder, f"serve-{uuid.uuid4().hex[:8]}.log")
    # A server clears the metrics of all servers that share its home.
    environment = {"BENTOML_HOME": str(folder / "bentoml"), **environment}
    with run_server(command, log, cwd or folder, **environment) as running, _server(running.url) as server:
        server.process, server.log = running.process, running.log
        yield server


@contextmanager
def app_server(**settings):
    """Serve the application from a thread of this process, with any settings."""
    from patchcore_plugin.bento.app import make_app, make_pipeline
    from patchcore_plugin.bento.metrics import Metrics
    from patchcore_plugin.bento.protocol import limited_protocol
    from patchcore_plugin.bento.settings import Settings
    from prometheus_client import CollectorRegistry

    settings, registry = Settings(**settings), CollectorRegistry()
    pipeline = make_pipeline(settings, Metrics(registry))
    pipeline.is_ready()
    with serve_app(make_app(settings, pipeline), limited_protocol(settings)) as server:
        server.registry = registry
        yield server


@contextmanager
def serve_app(app, protocol="auto"):
    """Serve an ASGI application from a thread of this process, on a free loopback port."""
    import uvicorn

    served = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", http=protocol))
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        while not served.started:
            assert thread.is_alive(), "the application does not start"
            time.sleep(0.01)
        port = served.servers[0].sockets[0].getsockname()[1]
        with _server(f"http://127.0.0.1:{port}") as server:
            yield server
    finally:
        served.should_exit = True
        thread.join(30)


@contextmanager
def _server(url):
    server = Server(url)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as server.client:
        yield server
