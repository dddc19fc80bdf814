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
from starlette.datastructures import Headers, MutableHeaders

from .logs import logger
from .problems import ProblemError, problem_response

if TYPE_CHECKING:
    from pydantic import SecretStr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEYLESS_PATHS = ("/ui", "/docs.json")  # the page asks its user for the key


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


class PostMiddleware(HttpMiddleware):
    """Base class of middleware that handles POST requests alone, which are those that score images."""

    def applies_to(self, scope: Scope) -> bool:
        """Whether the middleware handles a request."""
        return scope["type"] == "http" and scope["method"] == "POST"


class RequestIdMiddleware(HttpMiddleware):
    """Gives every request an id, its own from the header X-Request-ID or a new one, and returns the id in that header."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:12]
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class AccessLogMiddleware(HttpMiddleware):
    """Writes a line to the log for every request. A route adds fields to the line in ``request.state.log``."""

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
            line = {
                "request_id": state["request_id"],
                "method": scope["method"],
                "path": scope["path"],
                "status": state["status"],
                "milliseconds": round(1000 * (time.perf_counter() - started), 1),
                **({"code": state["code"]} if state["code"] else {}),
                **state["log"],
            }
            with contextlib.suppress(Exception):  # a full disk behind the log is no reason to fail a request
                logger.info("request", extra={"fields": line})


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


class ApiKeyMiddleware(HttpMiddleware):
    """Refuses a request without the API key, except for the page and the OpenAPI document.

    Args:
        app: The wrapped ASGI application.
        key: The API key; None refuses nothing.
    """

    def __init__(self, app: ASGIApp, key: SecretStr | None) -> None:
        super().__init__(app)
        self._key = None if key is None else key.get_secret_value().encode()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if self._key is not None and not scope["path"].startswith(_KEYLESS_PATHS):
            given = Headers(scope=scope).get("x-api-key", "").encode("latin-1")
            if not secrets.compare_digest(given, self._key):
                raise ProblemError("unauthorized", "The header X-API-Key is missing or wrong.")
        await self.app(scope, receive, send)


class BodyLimitMiddleware(PostMiddleware):
    """Refuses a body that is too large, by its stated length, or else as soon as it has grown too large.

    Args:
        app: The wrapped ASGI application.
        mebibytes: Largest body, in MiB.
    """

    def __init__(self, app: ASGIApp, mebibytes: int) -> None:
        super().__init__(app)
        self._mebibytes = mebibytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal():
            raise self._too_large()
        self._check(int(length))
        received = 0

        async def receive_and_check() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check(received)
            return message

        await self.app(scope, receive_and_check, send)

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
