"""Which hosts the service answers to, and which pages may send requests."""

import socket

import pytest
from patchcore_plugin.bento.hosts import is_foreign, is_known_host

OWN = socket.gethostname()


def request(server="127.0.0.1", method="GET", **headers):
    """A request's scope; the names of headers with ``_`` for ``-``."""
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": "/models", "server": (server, 3000), "headers": encoded}


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:3000", "localhost.", "127.0.0.1:3000", "127.9.9.9", "[::1]:3000", OWN, f"{OWN.upper()}:80"],
)
def test_names_of_this_computer_are_known(host):
    assert is_known_host(request(host=host), ())


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:3000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.5", "[::ffff:a00:5]",
     "localhost:3000@evil.example", "evil.example/localhost", "localhost localhost", "[localhost]", "localhost:999999", "",
     "a" * 300],
)  # fmt: skip
def test_other_names_are_not(host):
    assert not is_known_host(request(host=host), ())


def test_one_host_alone():
    twice = request(host="localhost")
    twice["headers"] *= 2
    assert not is_known_host(twice, ("*",))
    assert not is_known_host(request(), ("*",))


def test_addresses_are_known_to_connections_from_outside():
    """A page elsewhere has a name; a request for an address was meant for this computer, or for one that forwards to it."""
    for host in ("10.0.0.5:3000", "[fd00::5]", "127.0.0.1"):
        assert is_known_host(request("192.168.1.20", host=host), ())
    assert not is_known_host(request("192.168.1.20", host="evil.example"), ())
    assert is_known_host(request("fd00::5", host="[fd00::5]:3000"), ())
    assert not is_known_host({**request(host="10.0.0.5"), "server": ("/run/socket", None)}, ())


def test_names_of_the_setting():
    names = ("line-7.example.com", "10.0.0.5")
    assert all(is_known_host(request(host=host), names) for host in ("Line-7.example.com:80", "10.0.0.5"))
    assert not is_known_host(request(host="line-8.example.com"), names)
    assert is_known_host(request(host="evil.example"), ("*",))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://127.0.0.1:3000", "sec_fetch_site": "same-origin", "method": "POST"},
        {"origin": "https://line-7.example.com", "method": "POST"},  # a proxy that rewrites the host
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate"},
        {"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},  # a link
    ],
)
def test_own_pages(headers):
    assert not is_foreign(request(host="127.0.0.1:3000", **headers), ("line-7.example.com",))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:8080"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://[", "method": "POST"},
        {"origin": "file://127.0.0.1:3000"},
        {"origin": "http://127.0.0.1:3000.evil.example"},
        {"origin": "http://127.0.0.1:3000", "host": ""},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "method": "POST"},
    ],
)
def test_foreign_pages(headers):
    assert is_foreign(request(**{"host": "127.0.0.1:3000", **headers}), ("line-7.example.com",))


def test_default_ports():
    assert not is_foreign(request(host="localhost", origin="http://localhost:80"), ())
    assert not is_foreign(request(host="line-7", origin="https://line-7"), ())
    assert is_foreign(request(host="localhost:443", origin="http://localhost"), ())
