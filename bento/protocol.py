"""The HTTP server's connections: limits on what a client can hold before the application sees a request.

uvicorn has none of them: a head may grow without end, and a connection may wait for ever.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .problems import ProblemError

if TYPE_CHECKING:
    import asyncio

    from .settings import Settings

MAX_HEAD = 32_768
"""Most bytes of a request's head, with :data:`HEADER_COST` for each header."""
HEADER_COST = 64
"""What a header takes beside its bytes."""
MAX_PIPELINE = 16
"""Most requests of a connection that wait while another one is answered."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits of size, time and number.

    - A head, or trailers behind a body, of more than :data:`MAX_HEAD` bytes are answered 431.
    - A head that does not arrive in time is answered 408; a client that sends nothing, or reads no answer, is left.
    - Where there are too many connections, the one that has kept the service waiting longest is closed.

    Attributes:
        seconds: Longest time to wait for a client, in seconds.
        most: Most connections of this process.
    """

    seconds: float = 20
    most: int = 256

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.waits_since: float | None = None  # moment since which the client keeps the service waiting
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0  # bytes that the client had not read when the timer was set
        self._begun = False  # whether a part of a head has arrived
        self._size = 0  # of the head
        self._unparsed = 0  # bytes since the parser last found something
        self._refusal: ProblemError | None = None

    # ---- Connection

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, and close another one if there are too many."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.most:
            waiting = [one for one in self.connections if getattr(one, "waits_since", None) is not None]
            min(waiting, key=lambda one: one.waits_since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    # ---- Time

    def _wait(self) -> None:
        """Give the client its time, unless it runs already."""
        if self._timer is None:
            self.waits_since, self._unsent = time.monotonic(), self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(self.seconds, self._is_late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.waits_since = None

    def _is_late(self) -> None:
        reads = self.transport.get_write_buffer_size() < self._unsent
        self._stop_waiting()
        if reads:
            self._wait()
        elif self._begun and self._waits_for_head():
            detail = f"The head of the request did not arrive within {self.seconds:g} seconds."
            self._refuse(ProblemError("too_slow", detail))
        else:
            self.transport.abort()

    def _waits_for_head(self) -> bool:
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def _close(self) -> None:
        """Close the connection, once the client has read the rest of the answer."""
        self._stop_waiting()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._wait()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no other request has come."""
        self._close()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to read the rest of the answer."""
        super().on_response_complete()
        self._begun = False
        if self.transport.is_closing():
            self._close()
        elif self._timer is None and not self.pipeline:
            self.waits_since = time.monotonic()

    # ---- Size

    def data_received(self, data: bytes) -> None:
        """Parse bytes."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD and not self.transport.is_closing():
            self._refuse(_too_large())
        elif self._waits_for_head():
            self._begun = True
            self._wait()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._size = self._unparsed = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those behind a body come here too."""
        self._count(len(name) + len(value) + HEADER_COST)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer, and wait for the body, whose time is the application's matter."""
        self._stop_waiting()
        super().on_headers_complete()
        self.waits_since = time.monotonic()
        if len(self.pipeline) > MAX_PIPELINE:
            self._refusal = ProblemError("request_invalid", "Too many requests were sent before the first was answered.")
            raise self._refusal

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._stop_waiting()
        self._unparsed = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._unparsed = 0
        self._size += size
        if self._size > MAX_HEAD:
            self._refusal = _too_large()
            raise self._refusal  # the parser stops, and uvicorn calls send_400_response

    # ---- Answers

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request, or one that is too large."""
        self._refuse(self._refusal or ProblemError("request_invalid", msg))

    def _refuse(self, problem: ProblemError) -> None:
        """Answer a problem, and close the connection."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # a part of another answer has been sent
            return
        described = problem.describe(uuid.uuid4().hex[:12])
        content = described.model_dump_json().encode()
        head = (
            b"content-type: application/problem+json\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n"
            % (len(content), described.request_id.encode())
        )
        self.transport.write(STATUS_LINE[problem.status] + head + content)
        self._close()


def _too_large() -> ProblemError:
    return ProblemError("head_too_large", f"The head of a request may have {MAX_HEAD:,} bytes at most.")


def limited_protocol(settings: Settings) -> type[LimitedProtocol]:
    """The protocol with the limits of the settings, for ``uvicorn.Config(http=...)``."""
    limits = {"seconds": settings.receive_timeout, "most": settings.connections}
    return type(LimitedProtocol.__name__, (LimitedProtocol,), limits)
