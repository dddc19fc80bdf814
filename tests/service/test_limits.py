"""What one client can take from others: labels, memory, connections, places, time."""

import logging
import re
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest
from helpers.http import predict, predict_batch, wait_for
from helpers.server import app_server

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TRAILERS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


@contextmanager
def connections(server, count=1):
    """Open connections to a server."""
    host, port = server.removeprefix("http://").split(":")
    opened = [socket.create_connection((host, int(port)), timeout=10) for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


def status(connection) -> int | None:
    """Status of the answer on a connection; None if it is closed without one."""
    try:
        answer = connection.recv(65536)
    except ConnectionResetError:
        return None
    return int(answer.split()[1]) if answer else None


def is_closed(connection) -> bool:
    """Whether a connection is closed, once everything that came is read."""
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def received(connection, pause=0.0) -> int:
    """Bytes that come until the connection is closed, read with a pause between pieces."""
    total = 0
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 19):
            total += len(piece)
            time.sleep(pause)
    return total


@pytest.fixture(scope="module")
def server(bundle):
    """A server with little patience."""
    with app_server(bundle=bundle, receive_timeout=1.0, connections=20, queue=2, max_body=1) as server:
        yield server


def test_unknown_paths_share_a_label(server, caplog):
    caplog.set_level(logging.INFO, "patchcore.service")

    for number in range(40):
        assert server.client.get(f"/{number}" + number * "/abc" * 100).status_code == 404
        assert server.client.post(f"/ui/{number}", content=b"x").status_code in (404, 405)
        assert server.client.get(f"/samples/{number}").status_code == 404
    labels = set(re.findall(r'patchcore_requests_total{route="(.*?)"', server.client.get("/metrics").text))
    assert {"unknown", "/ui/", "/samples/"} <= labels <= {"unknown", "/ui/", "/samples/", "/metrics", "/predict", "/models"}
    assert max(len(record.fields["path"]) for record in caplog.records if hasattr(record, "fields")) == 200


def test_foreign_hosts_and_pages(server, caplog):
    caplog.set_level(logging.WARNING, "patchcore.service")
    for headers, code in (({"host": "evil.example"}, "host_unknown"), ({"origin": "http://evil.example"}, "origin_foreign")):
        for method, path in (("GET", "/models"), ("POST", "/predict"), ("GET", "/metrics"), ("GET", "/ui/"), ("GET", "/x")):
            response = server.client.request(method, path, headers=headers)
            assert response.json()["code"] == code, path
            assert "PATCHCORE_HOSTS" in response.json()["detail"]
    assert caplog.text.count("was refused: The service does not answer to the host 'evil.example'; the setting") == 5
    assert server.client.get("/models", headers={"origin": str(server)}).status_code == 200


def test_hosts_of_the_setting(bundle):
    with app_server(bundle=bundle, hosts="line-7.example.com, line-8") as server:
        assert server.client.get("/models", headers={"host": "LINE-8:80"}).status_code == 200
        assert server.client.get("/models", headers={"host": "line-9"}).status_code == 421


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "utf-16", "rot13", "zip", "unicode_escape", "x" * 300, ""])
@pytest.mark.parametrize("route", ["/predict", "/predict_batch", "/heatmap", "/explain"])
def test_character_sets(server, charset, route):
    """A form's text is UTF-8. Others may take long to decode, and stop everything meanwhile."""
    body = b'--a\r\nContent-Disposition: form-data; name="' + b"-a" * 2000 + b'"; filename="x"\r\n\r\nx\r\n--a--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=a; charset={charset}"}
    response = server.client.post(route, content=body, headers=headers)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert len(response.text) < 400


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf-8"'])
def test_form_in_utf_8(server, test_images, charset):
    body = b'--a\r\nContent-Disposition: form-data; name="image"; filename="\xc3\xa4"\r\n\r\nx\r\n--a--\r\n'
    headers = {"content-type": f"multipart/form-data; charset={charset}; boundary=a"}
    response = server.client.post("/predict", content=body, headers=headers)
    assert (response.status_code, "'ä'" in response.text) == (400, True)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /models HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(5000)),
        b"GET /models HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 400_000,
        b"GET /models HTTP/1.1\r\n" + b"a" * 400_000,
        b"GET /" + b"a" * 400_000,
        b"\r\n" * 200_000,
        TRAILERS + b"".join(b"X-%d: y\r\n" % number for number in range(5000)),
        TRAILERS + b"X: " + b"a" * 400_000,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 400_000,
    ],
    ids=["headers", "value", "name", "url", "empty-lines", "trailers", "trailer", "chunk-extension"],
)
def test_heads_without_end(server, sent):
    """What no body is has an end, however it comes."""
    with connections(server) as (connection,):
        with suppress(OSError):  # the answer may come before the end
            connection.sendall(sent)
        assert status(connection) in (431, None)
        assert is_closed(connection)


def test_many_requests_at_once_on_a_connection(server):
    with connections(server) as (connection,):
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        assert is_closed(connection)
    with connections(server) as (connection,):
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
        wait_for(lambda: connection.recv(65536).count(b"HTTP/1.1 200") > 0, 5)


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /mod", HEAD, b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_silent_connections_are_closed(server, sent):
    """Before, within and behind a head; behind an answer, where the connection is kept for a while."""
    with connections(server) as (connection,):
        connection.sendall(sent)
        started = time.monotonic()
        assert status(connection) == {b"": None, b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n": 200}.get(sent, 408)
        assert is_closed(connection)
        assert time.monotonic() - started < 8


def test_bytes_one_by_one_do_not_hold_a_connection(server):
    with connections(server) as (connection,):
        deadline = time.monotonic() + 6
        with suppress(OSError):
            while time.monotonic() < deadline:
                connection.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() < deadline


def test_answers_that_nobody_reads(bundle, tmp_path):
    """The connection is closed with what is still to be sent; a client that reads slowly gets everything."""
    size = 32 << 20
    (tmp_path / "large.png").write_bytes(bytes(size))
    request = b"GET /samples/large.png HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with app_server(bundle=bundle, samples=tmp_path, receive_timeout=0.5) as server, connections(server, 2) as (idle, slow):
        for connection in (idle, slow):
            connection.sendall(request)
        assert received(slow, pause=0.02) > size > received(idle)


def test_slow_bodies_take_no_place(server, test_images):
    """Bodies of one byte, more than the queue has places: others are answered, and the slow ones get 408."""
    with connections(server, 12) as slow:
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\na")
        for _ in range(3):
            assert predict(server.client, test_images[0]).status_code == 200
        assert {status(connection) for connection in slow} == {408}


def test_body_that_comes_in_time(server, test_images):
    content = test_images[0].read_bytes()
    with connections(server) as (connection,):
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content))
        for start in range(0, len(content), 1 << 14):
            connection.sendall(content[start : start + (1 << 14)])
            time.sleep(0.02)
        assert status(connection) == 200


def test_bodies_share_the_memory(bundle, test_images):
    """The largest on its way gives way to others."""
    with app_server(bundle=bundle, max_body=1) as server, connections(server, 5) as slow:
        for connection in slow:
            connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(999_000))
        (refused,), _, _ = select.select(slow, [], [], 10)
        assert status(refused) == 503
        assert predict(server.client, test_images[0]).status_code == 200


def test_the_longest_waiting_connection_gives_way(server, test_images):
    """With more connections than the limit, those that send nothing are closed before others."""
    with connections(server, 40) as silent, httpx.Client(base_url=str(server)) as client:
        for _ in range(3):
            assert predict(client, test_images[0]).status_code == 200
        assert is_closed(silent[0])


def test_images_of_a_batch(bundle, test_images):
    """They have a limit of pixels together, and those of another request come in between."""
    cell = test_images[0].read_bytes()
    with app_server(bundle=bundle, max_batch_pixels=24 * 300 * 300) as server, ThreadPoolExecutor(1) as pool:
        refused = server.client.post("/predict_batch", files=[("images", cell)] * 25)
        assert (refused.status_code, refused.json()["code"]) == (413, "batch_too_large")
        assert "25 images have 2,250,000 pixels together" in refused.json()["detail"]
        batch = pool.submit(predict_batch, server.client, [cell] * 24)
        anomalous = {"model": "cells", "verdict": "anomalous"}
        normal = {"model": "cells", "verdict": "normal"}

        def scored() -> float:
            counts = (server.registry.get_sample_value("patchcore_verdicts_total", labels) for labels in (anomalous, normal))
            return sum(count or 0 for count in counts)

        wait_for(lambda: scored() > 0)
        assert predict(server.client, cell).status_code == 200
        assert scored() < 20, "the image did not wait for the batch"
        assert len(batch.result()) == 24
