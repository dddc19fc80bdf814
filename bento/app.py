"""The HTTP application, put together from the settings."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.routing import Mount

from patchcore_plugin.cpu import cores
from patchcore_plugin.webhook import Receiver, Webhook

from . import history, page, routes
from .methods import ROUTES
from .middleware import (
    AccessLogMiddleware,
    ApiKeyMiddleware,
    BodyMiddleware,
    HostMiddleware,
    MethodsMiddleware,
    ProblemMiddleware,
    QueueLimitMiddleware,
    RequestIdMiddleware,
    TimeoutMiddleware,
)
from .pipeline import Pipeline
from .problems import EXCEPTION_HANDLERS
from .record import AnswerRecord
from .repository import make_repository
from .runner import RunnerClient, RunnerScorer
from .scorer import LocalScorer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.routing import BaseRoute

    from .metrics import Metrics
    from .settings import Settings

_DOCUMENT = "/docs.json"


def make_app(settings: Settings, pipeline: Pipeline | None = None) -> FastAPI:
    """The routes behind their middleware.

    Args:
        settings: The settings.
        pipeline: The pipeline that answers. BentoML takes an application before its process starts: there,
            ``app.state.pipeline`` is set at the start.
    """
    # BentoML looks for paths in an application's routes, and not in routers that it includes.
    own = [*routes.router.routes, *history.router.routes, *page.router.routes, Mount("/ui", page.PageFiles(), name="ui")]
    app = FastAPI(
        title="PatchCore",
        description="Scores images of parts against normal ones: score, verdict, regions, heatmap.",
        version="1",
        openapi_url=_DOCUMENT,
        docs_url=None,  # they would load their scripts from another host
        redoc_url=None,
        routes=own,
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=_close_at_end,
        middleware=[  # the outermost first
            Middleware(RequestIdMiddleware),
            Middleware(AccessLogMiddleware, routes=[_DOCUMENT, *map(_label_of, own)]),
            Middleware(ProblemMiddleware),
            Middleware(HostMiddleware, names=settings.hosts),
            Middleware(ApiKeyMiddleware, key=settings.api_key, open_metrics=settings.open_metrics),
            Middleware(BodyMiddleware, mebibytes=settings.max_body, seconds=settings.receive_timeout),
            Middleware(QueueLimitMiddleware, requests=settings.queue),
            Middleware(TimeoutMiddleware, seconds=settings.timeout),
            Middleware(MethodsMiddleware, routes=ROUTES.values()),
        ],
    )
    app.state.settings, app.state.pipeline = settings, pipeline
    return app


@asynccontextmanager
async def _close_at_end(app: FastAPI) -> AsyncIterator[None]:
    yield
    if app.state.pipeline is not None:
        await anyio.to_thread.run_sync(app.state.pipeline.close)


def _label_of(route: BaseRoute) -> str:
    """The name of a route in log and metrics: its path, or the folder of the paths that it takes."""
    return f"{route.path}/" if isinstance(route, Mount) else route.path.partition("{")[0]


def make_pipeline(settings: Settings, metrics: Metrics, runner: RunnerClient | None = None) -> Pipeline:
    """The pipeline of a process.

    Args:
        settings: The settings.
        metrics: Metrics to count in.
        runner: Client of the process that scores; None scores in this process.
    """
    repository = make_repository(settings, metrics)
    if runner is not None:
        scorer, parallel = RunnerScorer(runner), 2 * settings.max_batch_size * settings.runner_workers  # one batch waits
        parallel_large = parallel
    else:
        scorer, threads = LocalScorer(repository), settings.threads or cores()
        # While images are scored, one at a time in mode latency and else one by each thread, another one is decoded.
        parallel = 2 if settings.mode == "latency" else threads + 1
        parallel_large = threads if settings.mode == "throughput" else 2  # they take the memory
    limits = {name: getattr(settings, name) for name in ("max_pixels", "max_images", "max_batch_pixels")}
    webhook = make_webhook(settings, metrics)
    record = None if settings.record is None else AnswerRecord(settings.record, settings, metrics)
    return Pipeline(
        repository,
        scorer,
        metrics,
        **limits,
        parallel=parallel,
        parallel_large=parallel_large,
        webhook=webhook,
        record=record,
    )


def make_webhook(settings: Settings, metrics: Metrics) -> Webhook | None:
    """The webhook of a process, as the settings describe it; None if they describe none."""
    if settings.webhook is None:
        return None
    secret = settings.webhook_secret and settings.webhook_secret.get_secret_value()
    return Webhook(
        Receiver(settings.webhook.get_secret_value(), secret),
        settings.webhook_queue,
        count=lambda result, number: metrics.events.labels(result=result).inc(number),
        waiting=metrics.events_waiting.set,
    )
