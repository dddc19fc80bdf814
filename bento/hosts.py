"""Who may ask: the names that the service answers to, and the pages whose scripts may send requests.

A web page of another site can send requests to addresses that only the operator's computer reaches. The browser names the
site in the header ``Origin``. Where the site makes its own name lead to such an address (DNS rebinding), the browser names
the site in the header ``Host`` too.
"""

from __future__ import annotations

import re
import socket
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s/@\\?#:\[\]]{1,255}?)\.?)(?::([0-9]{1,5}))?", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}


def split_host(text: str) -> tuple[str, int | None] | None:
    """Split a header ``Host`` into the name or address, in lower case, and the port; None if it is not valid."""
    match = _HOST.fullmatch(text)
    if match is None:
        return None
    return (match[1] or match[2]).lower(), int(match[3]) if match[3] else None


def is_known_host(scope: Scope, names: Sequence[str]) -> bool:
    """Whether a request's header ``Host`` has a name that leads to this service alone.

    Known are the names of the setting; ``localhost`` and loopback addresses; the name of this computer; and, for connections
    from outside, any IP address, as no page elsewhere has an address for its name.

    Args:
        scope: The request.
        names: Names of the setting ``hosts``; ``*`` makes every name known.
    """
    given = Headers(scope=scope).getlist("host")
    split = split_host(given[0]) if len(given) == 1 else None
    if split is None:
        return False
    name = split[0]
    return "*" in names or name in names or name in ("localhost", _own_name()) or _is_address_here(name, scope)


def is_from_own_process(scope: Scope) -> bool:
    """Whether a request came through a Unix socket, which only BentoML makes, in a folder of this service's user.

    The client's address does not tell: it is also missing of a TCP connection that ended before it was taken.
    """
    server = scope.get("server")
    return server is not None and server[1] is None


def is_foreign(scope: Scope, names: Sequence[str]) -> bool:
    """Whether a script or form of another site's page sent a request; links to the service's page are not foreign.

    Args:
        scope: The request. Its header ``Host`` is a known one.
        names: Names of the setting ``hosts``; their pages are not foreign, whatever their port.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is not None:
        return not _is_same(origin, headers.get("host", ""), names)
    followed_link = scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed_link


def _is_same(origin: str, host: str, names: Sequence[str]) -> bool:
    scheme, _, address = origin.partition("://")
    page, service = split_host(address), split_host(host)
    if scheme not in _PORTS or page is None or service is None:
        return False
    default = _PORTS[scheme]
    return page[0] in names or (page[0], page[1] or default) == (service[0], service[1] or default)


def _is_address_here(name: str, scope: Scope) -> bool:
    """Whether a name is an IP address, a loopback one if the connection came from this computer."""
    try:
        address = ip_address(name)
        outside = not ip_address((scope["server"] or ("127.0.0.1",))[0]).is_loopback
    except ValueError:  # a name; or the path of a Unix socket
        return False
    return address.is_loopback or outside


@cache
def _own_name() -> str:
    return socket.gethostname().lower()
