"""One HTTP request with a limit for its whole time, by the standard library: the base install has no HTTP client.

Redirects are not followed, and no proxy is used: a request goes where the settings say, or nowhere.
"""

from __future__ import annotations

import http.client
import math
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping


class HttpError(Exception):
    """A request has no answer: the connection failed, the answer is no HTTP, came too late or is too large."""


class Reply(NamedTuple):
    """The answer to a request.

    Attributes:
        status: HTTP status.
        reason: The status in words, as the server gives it.
        headers: Headers of the answer; names in any case.
        body: Body of the answer.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    def seconds_to_wait(self) -> float | None:
        """What the header Retry-After says, seconds or a date; None where it says nothing that can be read."""
        text = (self.headers.get("Retry-After") or "").strip()
        if re.fullmatch(r"[0-9]{1,9}", text):
            return float(text)
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        return None


def check_url(name: str, url: str) -> None:
    """Refuse what is no URL of http or https.

    Args:
        name: Name of the setting, as the user wrote it.
        url: The URL.

    Raises:
        UsageError: If it is none; the message does not repeat the URL, which may hold a password.
    """
    problem = _problem_of(url)
    if problem:
        msg = f"{name} must be a URL such as http://127.0.0.1:1880/patchcore: {problem}."
        raise UsageError(msg)


def _problem_of(url: str) -> str:
    if not url.isascii() or not url.isprintable() or " " in url or len(url) > 2000:
        return "a space, a control character, or one that is not ASCII must be written as %20 or the like"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https"):
        return "it must begin with http:// or https://"
    if not parts.hostname:
        return "it has no host"
    if parts.username is not None or parts.password is not None:
        return "it may have no user and password"
    return ""


def send(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    seconds: float,
    most_bytes: int = 0,
) -> Reply:
    """Send a request, and read its answer.

    Args:
        url: URL that :func:`check_url` accepts.
        body: Body of a POST; None sends a GET.
        headers: Headers of the request.
        seconds: Longest time to connect, and then for request and answer together.
        most_bytes: Largest body of an answer. With 0 no body is read, whatever its length.

    Raises:
        HttpError: If there is no answer, whatever the other side does.
    """
    parts = urlsplit(url)
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=seconds, context=_tls())
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=seconds)
    cut = threading.Event()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.connect()
        timer = threading.Timer(seconds, _cut, [connection.sock, cut])
        timer.daemon = True
        timer.start()
        try:
            reply = _exchange(connection, target, body, headers or {}, most_bytes)
        finally:
            timer.cancel()
        if cut.is_set():  # the end of the connection passes for the end of the headers
            raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a size of a chunk that is no number
        if cut.is_set() or isinstance(error, TimeoutError):
            msg = f"no answer within {seconds:g} s"
        else:
            msg = str(error) or type(error).__name__
        raise HttpError(msg) from error
    finally:
        connection.close()
    return reply


def _exchange(
    connection: http.client.HTTPConnection, target: str, body: bytes | None, headers: Mapping[str, str], most_bytes: int
) -> Reply:
    everywhere = {"Connection": "close", "User-Agent": "patchcore-plugin"}
    connection.request("GET" if body is None else "POST", target, body, {**everywhere, **headers})
    with connection.getresponse() as response:
        content = response.read(most_bytes + 1) if most_bytes else b""
        if len(content) > most_bytes:
            msg = f"the answer has more than {most_bytes:,} bytes"
            raise HttpError(msg)
        if most_bytes and response.length:  # what is left of the stated length
            raise http.client.IncompleteRead(content, response.length)
        return Reply(response.status, response.reason[:100], response.headers, content)


def _cut(connection: socket.socket, cut: threading.Event) -> None:
    """End a connection under the thread that reads from it; TLS has a way of its own, which would wait."""
    cut.set()
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def pause_after(failures: int, first: float, longest: float, wanted: float | None, share: float) -> float:
    """Seconds to wait after a failure: doubled each time, and as long as the other side wants within the limit.

    Args:
        failures: Failures one after the other, from 1.
        first: Pause after the first one.
        longest: Longest pause.
        wanted: What the other side asked for.
        share: Random number in [0, 1): half of the pause is random, so that senders do not come back together.
    """
    doubled = min(longest, first * 2 ** min(failures - 1, 60))
    pause = doubled * (0.5 + share / 2)
    return pause if wanted is None or not math.isfinite(wanted) else min(longest, max(pause, wanted))
