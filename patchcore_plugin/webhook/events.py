"""Events, and how they are signed: as the Standard Webhooks say (https://www.standardwebhooks.com).

The headers of a request are ``webhook-id`` (the event's id, the same at every try), ``webhook-timestamp`` (seconds since
1970, when it was sent) and, with a secret, ``webhook-signature``: ``v1,`` and the base64 of the HMAC-SHA256 of
``{id}.{timestamp}.{body}``. The key is what the base64 behind ``whsec_`` means. A receiver refuses a timestamp that is some
minutes old, and leaves out an id that it knows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from patchcore_plugin.errors import UsageError
from patchcore_plugin.http_client import check_url

if TYPE_CHECKING:
    from collections.abc import Mapping

NORMAL = "normal"
"""The verdict that nobody is told of. There is no event either of a model without a threshold, which gives no verdict."""

_NUMBERS = "score", "threshold", "review_threshold", "ratio", "normalized_score", "p_value", "small_regions"
_ANSWER_FIELDS = "verdict", *_NUMBERS, "model", "version"
_MOST_REGIONS = 16
_PREFIX, _KEY_BYTES = "whsec_", (24, 64)  # as the standard says
_COMMAND = "python -c \"import base64, secrets; print('whsec_' + base64.b64encode(secrets.token_bytes(32)).decode())\""


@dataclass(frozen=True)
class Receiver:
    """Where events are sent to.

    Args:
        url: URL of the receiver, http or https.
        secret: Secret of the signature, ``whsec_`` and base64 of 24 to 64 bytes; None sends without a signature.

    Raises:
        UsageError: If either is wrong; the message does not repeat it.
    """

    url: str = field(repr=False)
    secret: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_url("webhook", self.url)
        if self.secret is not None:
            key_of(self.secret)

    def headers(self, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Headers of the request that tells an event."""
        headers = {
            "Content-Type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(timestamp),
        }
        if self.secret is not None:
            signed = f"{event_id}.{timestamp}.".encode() + body
            digest = hmac.new(key_of(self.secret), signed, hashlib.sha256).digest()
            headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
        return headers


def key_of(secret: str) -> bytes:
    """The key that a secret stands for.

    Raises:
        UsageError: If it stands for none.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True) if secret.startswith(_PREFIX) else b""
    except (binascii.Error, ValueError):
        key = b""
    if not _KEY_BYTES[0] <= len(key) <= _KEY_BYTES[1]:
        msg = f"webhook_secret must be {_PREFIX} and the base64 of 24 to 64 random bytes; this makes one: {_COMMAND}"
        raise UsageError(msg)
    return key


def make_event(answer: Mapping[str, Any], source: Mapping[str, str | None], event_id: str | None = None) -> dict[str, Any]:
    """Make the event that tells of an image.

    Args:
        answer: The answer for the image: fields as those of ``/predict``; or ``error`` alone, of an image that cannot be
            read.
        source: Where the image came from, such as its file, or the request's id.
        event_id: Id of the event; a new one by default.

    Returns:
        The event, for JSON: ``id``, ``type`` (``image.anomalous``, ``image.unreadable``, ...), ``timestamp`` and ``data``.
    """
    data: dict[str, Any] = {**source, **{name: answer.get(name) for name in _ANSWER_FIELDS}}
    regions = answer.get("regions")
    data["regions"] = None if regions is None else list(regions)[:_MOST_REGIONS]
    data["error"] = answer.get("error")
    kind = "unreadable" if data["error"] else data["verdict"]
    return {
        "id": event_id or uuid.uuid4().hex,
        "type": f"image.{kind}",
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "data": data,
    }


def is_told(verdict: str | None) -> bool:
    """Whether the receiver is told of an image with a verdict."""
    return verdict not in (None, NORMAL)


def to_json(event: Mapping[str, Any]) -> bytes:
    """An event as the bytes that are signed and sent."""
    return json.dumps(event, separators=(",", ":")).encode("ascii")
