"""The webhook: signed, kept on disk, delivered at least once whatever the receiver does, and never waited for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest
from helpers.http import wait_for
from helpers.receivers import SECRET, free_port, lie, read_request, receive

from patchcore_plugin.errors import UsageError
from patchcore_plugin.http_client import HttpError, Reply, pause_after, send
from patchcore_plugin.webhook import QueueError, Receiver, Webhook, make_event
from patchcore_plugin.webhook.queue import EventQueue

ANSWER = {
    "verdict": "anomalous",
    "score": 31.5,
    "threshold": 20.0,
    "ratio": 1.575,
    "model": "cells",
    "version": "0123456789ab",
}


def event(name="a.png", **answer):
    return make_event({**ANSWER, **answer}, {"file": name})


@pytest.fixture
def start(tmp_path):
    """A function that starts a webhook; all of them end with the test."""
    started = []

    def start(url, secret=None, file=tmp_path / "queue.sqlite", **arguments):
        arguments = {"first_pause": 0.05, "longest_pause": 0.2, **arguments}
        counts = Counter()
        webhook = Webhook(Receiver(url, secret), file, count=lambda name, number: counts.update({name: number}), **arguments)
        webhook.counts = counts
        started.append(webhook)
        return webhook

    yield start
    for webhook in started:
        webhook.close(0)


def test_an_event_is_told_and_signed(start):
    """The signature is what the Standard Webhooks say, computed here without the package's code."""
    with receive() as (receiver, url):
        told = event("sub/é\n.png", regions=[{"left": number} for number in range(30)])
        assert start(url, SECRET).tell(told)
        wait_for(lambda: receiver.requests)
    ((headers, body),) = receiver.requests
    sent = json.loads(body)
    assert sent == json.loads(json.dumps({**told, "data": {**told["data"], "regions": told["data"]["regions"][:16]}}))
    assert sent["type"] == "image.anomalous"
    assert sent["data"].items() >= {**ANSWER, "file": "sub/é\n.png", "p_value": None, "error": None}.items()
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == sent["id"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    key = base64.b64decode(SECRET.split("_")[1])
    assert key == b"0123456789abcdef" * 2
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


def test_known_signature():
    """The example of the standard's own libraries."""
    receiver = Receiver("http://127.0.0.1", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = receiver.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_without_a_secret_there_is_no_signature(start):
    with receive() as (receiver, url):
        start(url).tell(event())
        wait_for(lambda: receiver.requests)
    assert "webhook-signature" not in receiver.requests[0][0]


@pytest.mark.parametrize(
    ("url", "secret", "message"),
    [
        ("ftp://host/x", None, "begin with http"),
        ("host:80", None, "begin with http"),
        ("", None, "begin with http"),
        ("http://", None, "no host"),
        ("http://host:99999999/", None, "[Pp]ort"),
        ("http://[::1/", None, "IPv6"),
        ("http://user:geheim@host/", None, "no user and password"),
        ("http://host/a b", None, "%20"),
        ("http://host/\r\nX-Evil: 1", None, "%20"),
        ("http://höst/", None, "ASCII"),
        ("http://host/", "geheim", "whsec_"),
        ("http://host/", "whsec_geheim", "whsec_"),
        ("http://host/", "whsec_" + "A" * 20, "24 to 64"),
        ("http://host/", "whsec_é", "whsec_"),
    ],
)
def test_wrong_receivers(url, secret, message):
    with pytest.raises(UsageError, match=message) as caught:
        Receiver(url, secret)
    assert "geheim" not in str(caught.value)


def test_no_secret_is_shown():
    assert SECRET not in repr(Receiver("http://host/token", SECRET))
    assert "token" not in repr(Receiver("http://host/token", SECRET))


def test_receiver_that_is_down(start, caplog):
    """What happened meanwhile is told afterwards, in order and once."""
    port = free_port()
    webhook = start(f"http://127.0.0.1:{port}/events")
    told = [event(f"{number}.png") for number in range(20)]
    assert all(map(webhook.tell, told))
    wait_for(lambda: webhook.counts["failed"] >= 2)
    with receive(port=port) as (receiver, _):
        wait_for(lambda: len(receiver.requests) >= 20 and not len(webhook.queue))
    assert receiver.ids == [one["id"] for one in told]
    assert webhook.counts["queued"] == webhook.counts["delivered"] == 20
    assert "is down" in caplog.text
    assert "takes events again" in caplog.text


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_receiver_that_fails(start, status):
    answers = iter([status, status, (status, {"Retry-After": "0"})])
    with receive(lambda _: next(answers, 200)) as (receiver, url):
        webhook = start(url)
        webhook.tell(event("a.png"))
        webhook.tell(event("b.png"))
        wait_for(lambda: webhook.counts["delivered"] == 2)
    assert [one["data"]["file"] for one in receiver.events] == ["a.png"] * 4 + ["b.png"]
    assert len(set(receiver.ids)) == 2
    assert webhook.counts["failed"] == 3


def test_refused_event_holds_up_no_other(start):
    """It is tried again, and delivered when the receiver takes it after all."""
    mended = []
    with receive(lambda one: 400 if one["data"]["file"] == "bad.png" and not mended else 200) as (receiver, url):
        webhook = start(url)
        webhook.tell(event("bad.png"))
        wait_for(lambda: webhook.counts["refused"])
        for number in range(10):
            webhook.tell(event(f"{number}.png"))
        wait_for(lambda: webhook.counts["delivered"] == 10 and webhook.counts["refused"] >= 3)
        mended.append(True)
        wait_for(lambda: webhook.counts["delivered"] == 11)
    assert len(webhook.queue) == 0
    assert [one["data"]["file"] for one in receiver.events if one["data"]["file"] != "bad.png"] == [
        f"{number}.png" for number in range(10)
    ]


def test_redirect_is_not_followed(start):
    with receive() as (target, target_url), receive(lambda _: (307, {"Location": target_url})) as (_, url):
        webhook = start(url)
        webhook.tell(event())
        wait_for(lambda: webhook.counts["refused"] >= 2)
    assert target.requests == []
    assert len(webhook.queue) == 1


def drip(connection, stopped, piece, pause=0.01):
    while not stopped.wait(pause):
        connection.sendall(piece)


LIES = {
    "silence": lambda connection, stopped: stopped.wait(30),
    "closes": lambda connection, stopped: None,
    "garbage": lambda connection, stopped: connection.sendall(os.urandom(100_000)),
    "endless status": lambda connection, stopped: drip(connection, stopped, b"HTTP/1.1 2", 0),
    "endless header": lambda connection, stopped: (
        connection.sendall(b"HTTP/1.1 200 OK\r\n"),
        drip(connection, stopped, b"a"),
    ),
    "endless headers": lambda connection, stopped: (
        connection.sendall(b"HTTP/1.1 200 OK\r\n"),
        drip(connection, stopped, b"a: b\r\n"),
    ),
    "endless 100": lambda connection, stopped: drip(connection, stopped, b"HTTP/1.1 100 Continue\r\n\r\n"),
    "no number": lambda connection, stopped: connection.sendall(b"HTTP/1.1 two hundred\r\n\r\n"),
    "huge number": lambda connection, stopped: connection.sendall(b"HTTP/1.1 99999999999 OK\r\n\r\n"),
}


@pytest.mark.parametrize("lie_", LIES)
def test_answer_that_is_none(lie_):
    """It ends in time, with an error; a slow one by the limit for the whole time, as each of its bytes comes soon."""
    with lie(LIES[lie_]) as (url, _), pytest.raises(HttpError):
        send(url, b"{}", seconds=0.5)


@pytest.mark.parametrize("lie_", ["silence", "garbage", "endless headers"])
def test_receiver_without_tls(lie_):
    """What answers an encrypted request in this way ends in time too."""
    with lie(LIES[lie_]) as (url, _), pytest.raises(HttpError):
        send(url.replace("http:", "https:"), b"{}", seconds=0.5)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificate_is_checked(tmp_path):
    """One that nobody signed is refused; one that ``SSL_CERT_FILE`` names is taken, for its own host alone."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*map(str, command), *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as encrypted:
            read_request(encrypted)
            encrypted.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    code = """
import sys
from patchcore_plugin.http_client import HttpError, send
try:
    print(send(sys.argv[1], b"{}", seconds=10).status)
except HttpError as error:
    print(error)
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError):
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        said = []
        for host, trusted in [("127.0.0.1", ""), ("127.0.0.1", str(certificate)), ("localhost", str(certificate))]:
            url = f"https://{host}:{listener.getsockname()[1]}/"
            environment = {**os.environ, **({"SSL_CERT_FILE": trusted} if trusted else {})}
            command = [sys.executable, "-c", code, url]
            said.append(
                subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
            )
        listener.shutdown(socket.SHUT_RDWR)
    assert said[1] == "204\n"
    assert "certificate verify failed" in said[0]
    assert "certificate verify failed" in said[2]


ENDLESS_BODY = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n"


@pytest.mark.parametrize("head", ENDLESS_BODY)
def test_endless_body(start, head):
    """The status says that the receiver has the event; nobody reads the body."""
    with lie(lambda connection, stopped: (connection.sendall(head), drip(connection, stopped, b"x" * 65536, 0))) as (url, _):
        webhook = start(url)
        webhook.tell(event())
        wait_for(lambda: webhook.counts["delivered"] == 1, 8)
        with pytest.raises(HttpError, match="more than 1,000 bytes"):
            send(url, b"{}", seconds=5, most_bytes=1000)


def test_slow_body_has_a_limit():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    with (
        lie(lambda connection, stopped: (connection.sendall(head), drip(connection, stopped, b"x"))) as (url, _),
        pytest.raises(HttpError, match=r"within 0\.5 s"),
    ):
        send(url, b"{}", seconds=0.5, most_bytes=1 << 20)


def test_body_that_ends_early():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"
    with lie(lambda connection, stopped: connection.sendall(head)) as (url, _), pytest.raises(HttpError):
        send(url, b"{}", seconds=5, most_bytes=1000)


def test_receiver_that_lies_slows_nobody(start):
    """While a request hangs, events are taken, and ``close`` ends."""
    with lie(LIES["silence"]) as (url, taken):
        webhook = start(url)
        webhook.tell(event())
        wait_for(lambda: taken)
        for number in range(100):
            assert webhook.tell(event(f"{number}.png"))
        assert webhook.close(0.1) == 101


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7), ("0", 0), ("", None), ("soon", None), ("-5", None), ("9" * 30, None), ("Fri, 01 Jan 1999 00:00:00 GMT", 0)],
)
def test_retry_after(text, seconds):
    assert Reply(503, "", {"Retry-After": text}, b"").seconds_to_wait() == seconds


def test_pauses():
    """Doubled up to the limit, half of each by chance, and what the receiver wishes within the limit."""
    assert [pause_after(number, 1, 300, None, 1) for number in (1, 2, 3, 9, 10, 10_000)] == [1, 2, 4, 256, 300, 300]
    assert pause_after(3, 1, 300, None, 0) == 2
    assert pause_after(1, 1, 300, 20, 0.5) == 20
    assert pause_after(1, 1, 300, 10**9, 0.5) == 300
    assert pause_after(9, 1, 300, 0, 0) == 128


def test_queue_outlives_its_process(start, tmp_path):
    """Killed with SIGKILL right after an event was told: the next process delivers it."""
    file = tmp_path / "queue.sqlite"
    code = f"""
import sys, time
from pathlib import Path
from patchcore_plugin.webhook import Receiver, Webhook, make_event
webhook = Webhook(Receiver("http://127.0.0.1:{free_port()}/"), Path({str(file)!r}))
for number in range(50):
    webhook.tell(make_event({{"verdict": "anomalous"}}, {{"file": f"{{number}}.png"}}))
print("told", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"told\n"
    process.kill()
    process.communicate()
    with receive() as (receiver, url):
        webhook = start(url)
        wait_for(lambda: webhook.counts["delivered"] == 50)
    assert [one["data"]["file"] for one in receiver.events] == [f"{number}.png" for number in range(50)]


def test_processes_share_a_queue(tmp_path):
    """Three processes tell at once, and one delivers; when it is killed, another one goes on. Each event is told once."""
    file = tmp_path / "queue.sqlite"
    code = """
import sys, time
from pathlib import Path
from patchcore_plugin.webhook import Receiver, Webhook, make_event
webhook = Webhook(Receiver(sys.argv[1]), Path(sys.argv[2]))
for number in range(40):
    assert webhook.tell(make_event({"verdict": "anomalous"}, {"file": f"{sys.argv[3]}-{number}.png"}))
    time.sleep(0.02)
print("told", flush=True)
time.sleep(60)
"""
    with receive() as (receiver, url):
        command = [sys.executable, "-c", code, url, str(file)]
        processes = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE) for number in range(3)]
        try:
            for process in processes:
                assert process.stdout.readline() == b"told\n"
            wait_for(lambda: len(receiver.requests) >= 120)
            assert Counter(receiver.ids).most_common(1)[0][1] == 1
            for process in processes[:2]:  # one of them may be the one that delivers
                process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                process.wait(30)
            queue = EventQueue(file)
            queue.put("last", json.dumps({"data": {"file": "last.png"}}).encode())
            wait_for(lambda: "last" in receiver.ids)
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def test_full_disk(start, caplog, monkeypatch):
    """Events are lost, counted and said; nothing fails; when there is room again, events are told again."""
    opened, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: opened.append(connect(*args, **options)) or opened[-1])
    with receive() as (receiver, url):
        webhook = start(url)
        database = opened[0]
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count={pages}")
        results = [webhook.tell(event(f"{number}.png", error="x" * 100_000)) for number in range(10)]
        assert not any(results)
        assert webhook.counts["lost"] == 10
        assert caplog.text.count("Events of the webhook are lost") == 1
        database.execute("PRAGMA max_page_count=100000")
        assert webhook.tell(event("after.png"))
        wait_for(lambda: receiver.requests)
    assert [one["data"]["file"] for one in receiver.events] == ["after.png"]


def test_limits_of_the_queue(tmp_path):
    queue = EventQueue(tmp_path / "queue.sqlite")
    for number in range(10):
        queue.put(str(number), b"{}")
    assert queue.trim(most_events=6) == 4
    assert queue.first(fresh=True).id == "4"
    assert queue.trim(most_days=0) == 6
    assert queue.first(fresh=False) is None


@pytest.mark.parametrize("content", [b"no database" * 1000, None])
def test_file_that_is_no_queue(tmp_path, content):
    file = tmp_path / "queue.sqlite"
    if content is None:
        database = sqlite3.connect(file)
        database.execute("PRAGMA user_version=99")
        database.close()
    else:
        file.write_bytes(content)
    with pytest.raises(QueueError, match="Choose another file"):
        EventQueue(file)


def test_queue_below_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(QueueError, match=r"queue\.sqlite"):
        EventQueue(tmp_path / "file" / "queue.sqlite")
