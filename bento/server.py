"""What BentoML's server has no setting for: no port is open but the one of HTTP, and options of uvicorn.

``bentoml serve`` runs a supervisor, circus's ``Arbiter``, which starts the processes that answer and score, and starts one
again that has died. Each of those processes runs uvicorn.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import wraps
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn
from bentoml.exceptions import BentoMLConfigException
from starlette.responses import PlainTextResponse

from .hosts import is_from_own_process
from .middleware import HttpMiddleware, OwnRoutesMiddleware
from .protocol import limited_protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from circus.sockets import CircusSocket
    from circus.watcher import Watcher
    from starlette.types import Receive, Scope, Send

    from .settings import Settings


_SUPERVISOR = "BENTO_SUPERVISOR"
"""Environment variable with the number of the supervisor's process. In a virtual environment on Windows it is not the
parent: that is a process which waits for Python."""


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Options of uvicorn for the processes of the service; add one here, and it is used.

    They are arguments of ``uvicorn.Config``, such as ``http`` or ``h11_max_incomplete_event_size``. One that BentoML sets
    itself, such as ``timeout_keep_alive`` (5 s) and the options of ``bentoml serve``, goes before the one given here.
    """
    # A client that does not read its answer would hold up the end of the service for ever.
    return {"timeout_graceful_shutdown": math.ceil(settings.timeout) + 1, "http": limited_protocol(settings)}


def set_uvicorn_options(settings: Settings) -> None:
    """Let uvicorn take the options of :func:`uvicorn_options` in this process.

    BentoML imports the service's module, and makes a ``uvicorn.Config`` afterwards.
    """
    ours = uvicorn_options(settings)

    class Config(uvicorn.Config):
        def __init__(self, app: Any, *arguments: Any, **options: Any) -> None:
            for name, value in ours.items() if _is_ours(app) else ():
                if options.get(name) is None:
                    options[name] = value
            super().__init__(app, *arguments, **options)

    uvicorn.Config = Config


def _is_ours(app: Any) -> bool:
    """Whether an application of BentoML is that of this service or its runner, and not of another that depends on it."""
    return any(each.cls in (OwnRoutesMiddleware, UnixSocketOnlyMiddleware) for each in getattr(app, "user_middleware", ()))


def open_http_port_only() -> None:
    """Let BentoML's supervisor, in this process, listen at no other port than that of HTTP.

    The supervisor takes commands, also one that runs any program, from everybody who connects to its endpoint, and BentoML
    gives it TCP ports of this computer, which all its users can reach. The transport ``inproc`` of ZeroMQ stays inside the
    process, on Windows too. What else the supervisor opens is checked before it opens anything.
    """
    from circus.arbiter import Arbiter

    make = Arbiter.__init__
    if hasattr(make, "__wrapped__"):  # by the hook of the other service
        return

    @wraps(make)
    def make_without_ports(
        arbiter: Arbiter, watchers: list[Watcher], *, sockets: Sequence[CircusSocket], **options: Any
    ) -> None:
        _check(sockets, options)
        # BentoML's own folder for the metrics of all processes can be read by others, and is cleared by the next service.
        arbiter.metrics_folder = TemporaryDirectory(prefix="patchcore-metrics-", ignore_cleanup_errors=True)
        for watcher in watchers:
            watcher.env["PROMETHEUS_MULTIPROC_DIR"] = arbiter.metrics_folder.name
            watcher.env[_SUPERVISOR] = str(os.getpid())
        options.update(endpoint="inproc://commands", pubsub_endpoint="inproc://events")
        make(arbiter, watchers, sockets=sockets, **options)

    Arbiter.__init__ = make_without_ports


def _check(sockets: Sequence[CircusSocket], options: dict[str, Any]) -> None:
    """Refuse what would open another port, and a port that cannot be had."""
    if sum(not each.is_unix for each in sockets) > 1:
        msg = (
            "PATCHCORE_RUNNER=process needs Unix sockets, and so does a service with bentoml.depends(PatchcoreService). "
            "BentoML uses TCP instead on Windows, in WSL, and where BENTOML_NO_UDS is set, and every user of this computer "
            "could run code through that port. Set PATCHCORE_RUNNER=inside. Let the other service depend on an address: "
            "bentoml.depends(PatchcoreService, url='http://127.0.0.1:3000')."
        )
        raise BentoMLConfigException(msg)
    if options.get("plugins"):
        msg = "bentoml serve --reload needs a port for commands, which all users of this computer could reach; leave it out."
        raise BentoMLConfigException(msg)
    for wanted in sockets:
        if not wanted.is_unix:
            _check_port(wanted)


def _check_port(wanted: CircusSocket) -> None:
    """Refuse a port that is taken or may not be had: BentoML would end with a traceback that does not name it."""
    with socket.socket(wanted.family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # else the connections of a service that has just ended would hold its port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((wanted.host, wanted.port))
            probe.listen()
        except OSError as error:
            msg = (
                f"The service cannot listen at port {wanted.port} of {wanted.host}: {error.strerror or error}. A service "
                "that still runs may have the port, or another program. Choose another port by PATCHCORE_PORT or "
                "`bentoml serve --port`, another address by PATCHCORE_HOST or `--host`."
            )
            raise BentoMLConfigException(msg) from error


def end_with_supervisor() -> None:
    """End this process once its supervisor has ended, even if that was killed: else it would keep the port for ever."""
    number = int(os.environ.get(_SUPERVISOR) or os.getppid())

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(number)
            while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class UnixSocketOnlyMiddleware(HttpMiddleware):
    """Refuses every request that came over TCP, before its body is read: BentoML unpickles it.

    Args:
        app: The wrapped ASGI application.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if is_from_own_process(scope):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Only the service itself may use its runner.", 403)(scope, receive, send)
