"""What OpenVINO's conversion and NNCF do beside their work: reports to their makers, and another level of all logs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Send no message of OpenVINO's telemetry meanwhile, and leave the root logger as it was.

    A message takes a second on a machine without internet. A conversion that fails would leave the root logger at ERROR, so
    that no warning of anybody were seen afterwards.
    """
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        with _without_telemetry():
            yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


@contextmanager
def _without_telemetry() -> Iterator[None]:
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
