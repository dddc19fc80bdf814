"""PatchCore over HTTP: ``bentoml serve patchcore_plugin.bento.service:PatchcoreService``.

The service answers with the bundle that the setting ``bundle`` names (environment variable PATCHCORE_BUNDLE), with the
bundles in the folder that ``bundles`` names, or else with the newest model ``patchcore`` in BentoML's model store, where
``patchcore pack BUNDLE`` puts one. All settings: :class:`.settings.Settings`.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml.exceptions import BentoMLConfigException

from patchcore_plugin.bundle import BundleError, read_manifest, verify
from patchcore_plugin.record import RecordError, prepare
from patchcore_plugin.webhook import EventQueue, QueueError

from .app import make_app, make_pipeline
from .logs import start_logging
from .methods import NAME, PatchcoreMethods
from .metrics import Metrics
from .middleware import OwnRoutesMiddleware
from .repository import find_bundles
from .runner import common_options, make_runner
from .server import end_with_supervisor, open_http_port_only, set_uvicorn_options
from .settings import read_settings

if TYPE_CHECKING:
    from .settings import Settings


def make_service(settings: Settings) -> bentoml.Service[Any]:
    """BentoML's service for the processes that answer requests."""
    app = make_app(settings)

    @bentoml.service(
        name=NAME,
        workers=settings.workers,
        http={"host": settings.host, "port": settings.port},
        tracing=_tracing_options(settings),
        metrics={"enabled": False},  # they would keep every path that a client sends; our own application has the route
        **common_options(settings),
    )
    @bentoml.asgi_app(app, path="/", name="patchcore")
    class PatchcoreService(PatchcoreMethods):
        """Scores images with PatchCore models."""

        if settings.runner == "process":
            runner = bentoml.depends(make_runner(settings))

        def __init__(self) -> None:
            end_with_supervisor()
            start_logging(settings.log)
            client = self.runner.to_async if settings.runner == "process" else None
            self.pipeline = app.state.pipeline = make_pipeline(settings, Metrics(), client)
            self.pipeline.is_ready()

        def __is_ready__(self) -> bool:
            """Whether the process can answer requests."""
            return self.pipeline.is_ready()

        @bentoml.on_deployment
        @staticmethod
        def prepare() -> None:
            """Prepare the supervisor, and check what there is to serve, once, before the processes start."""
            open_http_port_only()
            check(settings)

    PatchcoreService.add_asgi_middleware(OwnRoutesMiddleware, own=app)
    return PatchcoreService


def check(settings: Settings) -> None:
    """Print the settings, and check the bundles, the record and the webhook's queue.

    A single damaged bundle is an error; of several, damaged ones are named, and the others are served.

    Raises:
        BentoMLConfigException: If there is nothing to serve, or record or queue cannot be used.
    """
    _print("\n".join(["PatchCore service", *(f"  {name}: {value}" for name, value in settings if value is not None)]))
    try:
        if settings.webhook_queue is not None:
            EventQueue(settings.webhook_queue).close()
        found = find_bundles(settings)
        for name, path in found.items():
            try:
                verify(path, read_manifest(path))
            except BundleError as error:
                if len(found) == 1:
                    raise
                _print(f"{name} cannot be served: {error}")
    except (BundleError, QueueError) as error:
        raise BentoMLConfigException(str(error)) from error
    if settings.default_model is not None and settings.default_model not in found:
        names = ", ".join(found) or "none"
        msg = f"PATCHCORE_DEFAULT_MODEL: there is no bundle {settings.default_model!r}; found: {names}."
        raise BentoMLConfigException(msg)
    if settings.record is not None:
        try:
            prepare(settings.record)
        except RecordError as error:
            msg = f"PATCHCORE_RECORD: {error}"
            raise BentoMLConfigException(msg) from error
    if not found:
        _print(f"There is no bundle in {settings.bundles} yet.")


def _print(text: str) -> None:
    with suppress(OSError):  # a full disk behind the log is no reason not to serve
        print(text, file=sys.stderr, flush=True)


def _tracing_options(settings: Settings) -> dict[str, Any]:
    """BentoML's configuration of OpenTelemetry."""
    if settings.trace_to is None:
        # Spans that nobody collects would take a tenth of what a request costs beside scoring.
        return {"excluded_urls": ".*"}
    return {
        "exporter_type": "otlp",
        "sample_rate": settings.trace_share,
        "otlp": {"protocol": "http", "endpoint": settings.trace_to},
    }


_settings = read_settings()
set_uvicorn_options(_settings)
PatchcoreService = make_service(_settings)
