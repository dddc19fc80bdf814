"""Servers for tests, run as the demo runs its own."""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from pathlib import Path

from patchcore_plugin.operations.serving import BENTOML, SERVE, SERVICE, run_server

__all__ = ["BENTOML", "SERVE", "SERVICE", "bentoml_serve"]


class Server(str):
    """A running server: its URL, process and log."""


@contextmanager
def bentoml_serve(command, folder, cwd=None, **environment):
    """Run a server that logs to ``folder``, in ``cwd`` or there."""
    with run_server(command, Path(folder, f"serve-{uuid.uuid4().hex[:8]}.log"), cwd or folder, **environment) as running:
        server = Server(running.url)
        server.process, server.log = running.process, running.log
        yield server
