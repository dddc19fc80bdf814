"""ASGI middleware of the service: one class for each concern."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from .hosts import is_foreign, is_from_own_process, is_known_host
from .logs import logger
from .problems import PROBLEMS, ProblemError, problem_response

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pydantic import SecretStr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEALTH_PATHS = ("/livez", "/readyz", "/healthz")
_MAX_LOGGED_PATH = 200
_BENTOML = "patchcore.bentoml"  # where a request keeps BentoML's own application
_PIECE = 16_384  # bytes of a body that the form's parser takes at a time


def new_request_id() -> str:
    """An id for a request that has none."""
    return uuid.uuid4().hex[:12]


class HttpMiddleware(ABC):
    """Base class of middleware that handles HTTP requests, and passes everything else on.

    Args:
        app: The wrapped ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or pass it on."""
        handle = self.handle if self.applies_to(scope) else self.app
        await handle(scope, receive, send)

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return scope["type"] == "http"

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""


class OutsideMiddleware(HttpMiddleware):
    """Base class of middleware that handles requests from outside, and not those of this service's own processes."""

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return super().applies_to(scope) and not is_from_own_process(scope)


class PostMiddleware(HttpMiddleware):
    """Base class of middleware that handles POST requests alone, which are those that score images."""

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return scope["type"] == "http" and scope["method"] == "POST"


class OwnRoutesMiddleware(HttpMiddleware):
    """Leaves the health checks to BentoML, and everything else to the service's own application.

    BentoML's other routes have no use here: its page loads a script of another site, and its document of the interface
    repeats ours. A health check needs neither a known Host nor a key.

    Args:
        app: BentoML's application.
        own: The service's application.
    """

    def __init__(self, app: ASGIApp, own: ASGIApp) -> None:
        super().__init__(app)
        self._own = own

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return scope["type"] != "lifespan" and scope.get("path") not in _HEALTH_PATHS

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        scope[_BENTOML] = self.app
        await self._own(scope, receive, send)


class MethodsMiddleware(HttpMiddleware):
    """Leaves calls of the service's methods to BentoML, if another process of the same bento makes them.

    They come through a Unix socket that nobody else can reach, for BentoML unpickles what they send.

    Args:
        app: The wrapped ASGI application.
        routes: Paths of the methods.
    """

    def __init__(self, app: ASGIApp, routes: Collection[str]) -> None:
        super().__init__(app)
        self._routes = routes

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return (
            super().applies_to(scope)
            and is_from_own_process(scope)
            and scope["path"] in self._routes
            and Headers(scope=scope).get("content-type") == "application/vnd.bentoml+pickle"
        )

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        await scope[_BENTOML](scope, receive, send)


class RequestIdMiddleware(HttpMiddleware):
    """Gives every request an id, its own from the header X-Request-ID or a new one, and returns the id in that header."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class AccessLogMiddleware(HttpMiddleware):
    """Writes a line to the log for every request, and counts it. A route adds fields to the line in ``request.state.log``.

    Args:
        app: The wrapped ASGI application.
        routes: Paths of the application's routes; one that ends in ``/`` stands for all paths below it.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[str]) -> None:
        super().__init__(app)
        self._folders = tuple(path for path in routes if path.endswith("/") and path != "/")
        self._routes = frozenset(routes) - {*self._folders}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        started, state = time.perf_counter(), scope["state"]
        state.update(status=None, code=None, log={})

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - started
            scope["app"].state.pipeline.metrics.count_request(self._route_of(scope["path"]), state["status"], seconds)
            line = {
                "request_id": state["request_id"],
                "method": scope["method"],
                "path": scope["path"][:_MAX_LOGGED_PATH],
                "status": state["status"],
                "milliseconds": round(1000 * seconds, 1),
                **({"code": state["code"]} if state["code"] else {}),
                **state["log"],
            }
            with contextlib.suppress(Exception):  # a full disk behind the log is no reason to fail a request
                logger.info("request", extra={"fields": line})

    def _route_of(self, path: str) -> str:
        """The route of a path. A client may send any path: those without a route share one label in the metrics."""
        if path in self._routes:
            return path
        return next((folder for folder in self._folders if path.startswith(folder)), "unknown")


class ProblemMiddleware(HttpMiddleware):
    """Answers a request with a problem where routes or middleware raise an exception."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            response = problem_response(scope, error)
            if scope["state"]["status"] is not None:
                raise  # a part of another response has been sent
            await response(scope, receive, send)


class HostMiddleware(OutsideMiddleware):
    """Refuses a request that is for another host, or comes from a page of another site.

    Args:
        app: The wrapped ASGI application.
        names: Names that the service answers to, beside those that it knows by itself.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        super().__init__(app)
        self._names = names

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        headers = Headers(scope=scope)
        if not is_known_host(scope, self._names):
            given = ", ".join(headers.getlist("host"))[:100]
            detail = f"The service does not answer to the host {given!r}; the setting PATCHCORE_HOSTS lists more names."
            raise ProblemError("host_unknown", detail)
        if is_foreign(scope, self._names):
            page = headers.get("origin", "another site")[:100]
            detail = f"A page of {page!r} may not send requests; the setting PATCHCORE_HOSTS lists the sites that may."
            raise ProblemError("origin_foreign", detail)
        await self.app(scope, receive, send)


class ApiKeyMiddleware(OutsideMiddleware):
    """Refuses a request without the API key, except for the page, which asks its user for the key.

    Args:
        app: The wrapped ASGI application.
        key: The API key; None refuses nothing.
        open_metrics: Answer /metrics without the key.
    """

    def __init__(self, app: ASGIApp, key: SecretStr | None, *, open_metrics: bool) -> None:
        super().__init__(app)
        self._key = None if key is None else key.get_secret_value().encode()
        self._open = ("/", "/ui", *(["/metrics"] if open_metrics else []))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        path = scope["path"]
        if self._key is not None and path not in self._open and not path.startswith("/ui/"):
            headers = Headers(scope=scope)
            given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode("latin-1"), self._key):
                raise ProblemError("unauthorized", PROBLEMS["unauthorized"][1])
        await self.app(scope, receive, send)


class BodyMiddleware(PostMiddleware):
    """Waits for the whole body before a request goes on: a request on its way takes no place among those in work.

    A body that is too large is refused by its stated length, or else as soon as it has grown too large. Where all bodies
    take too much memory together, the largest one on its way is refused.

    Args:
        app: The wrapped ASGI application.
        mebibytes: Largest body, in MiB. All bodies together may take four times as much.
        seconds: Longest time for a body to arrive, in seconds.
    """

    def __init__(self, app: ASGIApp, mebibytes: int, seconds: float) -> None:
        super().__init__(app)
        self._mebibytes, self._seconds = mebibytes, seconds
        self._on_their_way: dict[anyio.CancelScope, bytearray] = {}
        self._arrived = 0  # bytes of the bodies whose requests are in work

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        headers = Headers(scope=scope)
        stated = headers.get("content-length", "0")
        if not stated.isdecimal():
            raise self._too_large()
        self._check(int(stated))
        body = await self._read(receive)
        size = max(len(body), 1)
        step = _PIECE if headers.get("content-type", "").lower().startswith("multipart/") else size
        starts = iter(range(0, size, step))

        async def receive_piece() -> Message:
            """A piece of a form, which is parsed with turns of other requests in between; or the whole body."""
            start = next(starts, None)
            if start is None:
                return await receive()
            await anyio.lowlevel.checkpoint()
            piece, more = bytes(body[start : start + step]), start + step < size
            if not more:
                body.clear()
            return {"type": "http.request", "body": piece, "more_body": more}

        self._arrived += size
        try:
            await self.app(scope, receive_piece, send)
        finally:
            self._arrived -= size

    async def _read(self, receive: Receive) -> bytearray:
        """Wait for the body of a request."""
        body = bytearray()
        with anyio.move_on_after(self._seconds) as waiting:
            self._on_their_way[waiting] = body
            try:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    self._check(len(body))
                    if not message.get("more_body", False):
                        return body
                    self._make_room()
            finally:
                del self._on_their_way[waiting]
        if anyio.current_time() < waiting.deadline:
            detail = "The bodies of all requests take too much memory together; try again in a second."
            raise ProblemError("busy", detail, {"Retry-After": "1"})
        raise ProblemError("too_slow", f"The body of the request did not arrive within {self._seconds:g} seconds.")

    def _make_room(self) -> None:
        if self._arrived + sum(map(len, self._on_their_way.values())) > 4 * self._mebibytes << 20:
            max(self._on_their_way, key=lambda waiting: len(self._on_their_way[waiting])).cancel()

    def _check(self, size: int) -> None:
        if size > self._mebibytes << 20:
            raise self._too_large()

    def _too_large(self) -> ProblemError:
        return ProblemError("body_too_large", f"The body of a request may have {self._mebibytes} MiB at most.")


class QueueLimitMiddleware(PostMiddleware):
    """Refuses a request while too many others are in work or waiting.

    Args:
        app: The wrapped ASGI application.
        requests: Most requests at once.
    """

    def __init__(self, app: ASGIApp, requests: int) -> None:
        super().__init__(app)
        self._limit, self._inside = requests, 0

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if self._inside >= self._limit:
            detail = f"{self._inside} requests are in work or waiting; try again in a second."
            raise ProblemError("busy", detail, {"Retry-After": "1"})
        gauge = scope["app"].state.pipeline.metrics.requests
        self._inside += 1
        gauge.set(self._inside)
        try:
            await self.app(scope, receive, send)
        finally:
            self._inside -= 1
            gauge.set(self._inside)


class TimeoutMiddleware(PostMiddleware):
    """Ends a request that takes too long.

    Args:
        app: The wrapped ASGI application.
        seconds: Longest time of a request, in seconds.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        super().__init__(app)
        self._seconds = seconds

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        try:
            with anyio.fail_after(self._seconds):
                await self.app(scope, receive, send)
        except TimeoutError:
            if scope["state"]["status"] is None:
                raise ProblemError("timeout", f"There was no answer within {self._seconds:g} seconds.") from None
