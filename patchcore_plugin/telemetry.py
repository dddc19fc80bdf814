"""No reports to others: OpenVINO's conversion and NNCF tell their makers of each use, unless a user has said no."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Send no message of OpenVINO's telemetry meanwhile; on a machine without internet they take a second, too."""
    try:
        from openvino_telemetry.utils.sender import TelemetrySender
    except ImportError:  # then nothing is sent anyway
        yield
        return
    send = TelemetrySender.send
    TelemetrySender.send = lambda *_: None
    try:
        yield
    finally:
        TelemetrySender.send = send
