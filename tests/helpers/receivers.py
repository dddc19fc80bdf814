"""Receivers of webhooks on a free port of 127.0.0.1: honest, slow and lying ones."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="  # the base64 of 0123456789abcdef, twice


class Receiver:
    """A receiver that answers each request with what a function says, and keeps all of them.

    Attributes:
        requests: Headers (names in lower case) and body of each request.
        statuses: Function from an event, decoded, to the status, or to the status and headers, of its answer.
    """

    def __init__(self, statuses) -> None:
        self.requests, self.statuses = [], statuses

    @property
    def events(self) -> list[dict]:
        """The events of all requests."""
        return [json.loads(body) for _, body in self.requests]

    @property
    def ids(self) -> list[str]:
        """The id of each request."""
        return [headers["webhook-id"] for headers, _ in self.requests]


@contextmanager
def receive(statuses=lambda event: 204, port=0):
    """Run an honest receiver; the context's value is the receiver and its URL."""
    receiver = Receiver(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = receiver.statuses(json.loads(body))
            receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "2")
            with suppress(OSError):  # the sender reads no body, and may have given up
                self.end_headers()
                self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver, f"http://127.0.0.1:{server.server_port}/events"
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def read_request(connection) -> None:
    """Read a whole request: one that is closed with bytes unread is reset, and its answer may be lost."""
    with connection.makefile("rb") as stream:
        stream.readline(65536)
        stream.read(int(http.client.parse_headers(stream).get("content-length", 0)))


@contextmanager
def lie(answer):
    """Run a receiver that gives each connection to a function; the context's value is the URL, and a list of connections."""
    listener, taken, stopped = socket.create_server(("127.0.0.1", 0)), [], threading.Event()

    def serve():
        while not stopped.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                taken.append(connection)
                threading.Thread(target=work, args=(connection,), daemon=True).start()

    def work(connection):
        with suppress(OSError):
            read_request(connection)
            answer(connection, stopped)
        connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/events", taken
    finally:
        stopped.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
