"""The service for tests: a real BentoML server, run as the demo runs its own, or its application in this process."""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from patchcore_plugin.operations.serving import BENTOML, SERVE, SERVICE, run_server

if TYPE_CHECKING:
    import subprocess

__all__ = ["BENTOML", "SERVE", "SERVICE", "app_client", "bentoml_serve"]


class Server(str):
    """A running server: its URL, process, log and client."""

    process: subprocess.Popen
    log: Path
    client: httpx.Client

    def children(self) -> list[psutil.Process]:
        """All processes below the server's own."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def bentoml_serve(command, folder, cwd=None, **environment):
    """Run a server that logs to ``folder``, in ``cwd`` or there."""
    log = Path(folder, f"serve-{uuid.uuid4().hex[:8]}.log")
    with run_server(command, log, cwd or folder, **environment) as running:
        server = Server(running.url)
        server.process, server.log = running.process, running.log
        with httpx.Client(base_url=server, timeout=60, trust_env=False) as server.client:
            yield server


@contextmanager
def app_client(**settings):
    """A client of the application in this process, with any settings; its metrics are in ``client.registry``."""
    from fastapi.testclient import TestClient
    from patchcore_plugin.bento.app import make_app, make_pipeline
    from patchcore_plugin.bento.metrics import Metrics
    from patchcore_plugin.bento.settings import Settings
    from prometheus_client import CollectorRegistry

    settings, registry = Settings(**settings), CollectorRegistry()
    pipeline = make_pipeline(settings, Metrics(registry))
    assert pipeline.is_ready()
    with TestClient(make_app(settings, pipeline), raise_server_exceptions=False) as client:
        client.registry, client.pipeline = registry, pipeline
        yield client
