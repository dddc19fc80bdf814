"""The service's door: queue, key, limits of size and time for a request; and what is written down of it afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import time
import uuid
from typing import TYPE_CHECKING, Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics
    from .settings import Settings

logger = logging.getLogger("patchcore.service")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/ui", "/docs.json")  # the page asks for the key itself


class ProblemError(Exception):
    """A request that is answered with a problem.

    Args:
        status: HTTP status.
        code: What is wrong, in a word that stays the same.
        detail: What is wrong, in a sentence.
        headers: Of the answer.
    """

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers


def problem(status: int, code: str, detail: str, request_id: str) -> dict[str, Any]:
    """A problem as it is answered."""
    return {"status": status, "code": code, "detail": detail, "request_id": request_id}


def problem_response(scope: Scope, error: ProblemError) -> JSONResponse:
    """The answer that says what is wrong, and a note of it for the log."""
    scope["state"]["code"] = error.code
    content = problem(error.status, error.code, error.detail, scope["state"]["request_id"])
    return JSONResponse(content, error.status, error.headers, media_type="application/problem+json")


class Door:
    """ASGI middleware around the service's own routes.

    Args:
        app: They.
        settings: Limits and key.
        metrics: Gives the metrics, which exist once the process has started.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Callable[[], Metrics]) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:12]
        scope.setdefault("state", {}).update(request_id=request_id, code=None, status=None)
        started = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"]["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._let_in(scope, headers, receive, answer)
        except Exception:
            logger.exception("request %s failed", request_id)
            if scope["state"]["status"] is not None:
                raise  # half an answer has gone out
            failed = ProblemError(500, "internal", "Something went wrong inside; the log says what.")
            await problem_response(scope, failed)(scope, receive, answer)
        finally:
            self._note(scope, 1000 * (time.perf_counter() - started))

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        working = scope["method"] == "POST"
        try:
            self._check(scope, headers, working=working)
        except ProblemError as error:
            await problem_response(scope, error)(scope, receive, send)
            return
        if not working:
            await self.app(scope, receive, send)
            return
        self._inside += 1
        self.metrics().queue.set(self._inside)
        try:
            with anyio.fail_after(self.settings.timeout):
                await self.app(scope, self._limited(receive), send)
        except TimeoutError:
            if scope["state"]["status"] is None:
                late = ProblemError(504, "timeout", f"There was no answer within {self.settings.timeout:g} seconds.")
                await problem_response(scope, late)(scope, receive, send)
        finally:
            self._inside -= 1
            self.metrics().queue.set(self._inside)

    def _check(self, scope: Scope, headers: Headers, *, working: bool) -> None:
        key = self.settings.api_key
        if key is not None and not scope["path"].startswith(_OPEN):
            given = headers.get("x-api-key", "")
            if not secrets.compare_digest(given.encode("latin-1"), key.get_secret_value().encode()):
                raise ProblemError(401, "unauthorized", "The header X-API-Key is missing or wrong.")
        if not working:
            return
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > self._most):
            raise self._too_large()
        if self._inside >= self.settings.queue:
            detail = f"{self._inside} requests are being worked on or waiting; try again in a second."
            raise ProblemError(503, "busy", detail, {"Retry-After": "1"})

    @property
    def _most(self) -> int:
        return self.settings.max_body << 20

    def _too_large(self) -> ProblemError:
        return ProblemError(413, "body_too_large", f"A request's body may have {self.settings.max_body} MiB at most.")

    def _limited(self, receive: Receive) -> Receive:
        """Count the bytes of a body that does not say how long it is."""
        seen = 0

        async def receive_and_count() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._too_large()
            return message

        return receive_and_count

    def _note(self, scope: Scope, milliseconds: float) -> None:
        state = scope["state"]
        if state["code"]:
            self.metrics().rejected.labels(code=state["code"]).inc()
        line = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": state["status"],
            "milliseconds": round(milliseconds, 1),
            **({"code": state["code"]} if state["code"] else {}),
            **state.get("log", {}),
        }
        with contextlib.suppress(Exception):  # a full disk behind the log is no reason to fail a request
            logger.info("request", extra={"fields": line})


class LogFormatter(logging.Formatter):
    """Lines with their fields: ``name=value`` after the text, or all of it as JSON."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields = getattr(record, "fields", {})
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        if self.form == "json":
            line = {"time": moment, "level": record.levelname, "logger": record.name, "message": text, **fields}
            return json.dumps(line, default=str)
        pairs = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in fields.items())
        return " ".join(part for part in (moment, record.levelname, text, pairs) if part)
