"""A BentoML server in a process of its own, for as long as it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BENTOML = (sys.executable, "-m", "bentoml")
SERVICE = "patchcore_plugin.bento.service:PatchcoreService"
SERVE = (*BENTOML, "serve", SERVICE)
"""The command that serves bundles; environment variables say which."""

_START_SECONDS = 120
_END_SECONDS = 10
_LOG_TAIL_LINES = 30


class ServerStartError(PatchcoreError, RuntimeError):
    """A server ended, or was not ready in time; the message has the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its URL, without a slash at the end.
        process: The process that was started; the server's workers are its children.
        log: File with its output.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def run_server(command: Sequence[str], log: Path, cwd: Path | None = None, **environment: str) -> Iterator[Server]:
    """Run a BentoML server on a free port of this machine alone, and end it with its workers afterwards.

    Args:
        command: Command that serves, such as :data:`SERVE`; host and port are added.
        log: File to write the server's output to.
        cwd: Folder to run it in; the present one by default.
        **environment: Environment variables beside those of this process.

    Raises:
        ServerStartError: If the server ends, or is not ready in two minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env={**os.environ, "BENTOML_DO_NOT_TRACK": "True", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        _end(process)


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    # whatever proxy leads out of this machine, it does not lead back to it
    with httpx.Client(trust_env=False, timeout=2) as client:
        while time.monotonic() < deadline and server.process.poll() is None:
            try:
                if client.get(f"{server.url}/readyz").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    tail = "\n".join(server.log.read_text("locale", "replace").splitlines()[-_LOG_TAIL_LINES:])
    msg = f"The service did not start. The end of {server.log}:\n{tail}"
    raise ServerStartError(msg)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a server end its workers and remove its temporary files; kill what has not ended in time."""
    if process.poll() is None:
        server = psutil.Process(process.pid)
        members = [server, *server.children(recursive=True)]  # the server first: it would start its workers again
        server.terminate()
        for member in psutil.wait_procs(members, _END_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(30)
