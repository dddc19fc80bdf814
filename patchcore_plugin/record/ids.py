"""Ids of answers: the time of the answer, then chance. So the order of ids is that of time."""

from __future__ import annotations

import re
import secrets
import time
from datetime import datetime, timezone

ID = re.compile("[0-9a-f]{24}")
"""What an id looks like."""

_LAST_MILLISECOND = 253_402_300_799_999  # of the year 9999


def make_id() -> str:
    """A new id, different from all others, also from those of other processes."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def first_id(moment: datetime) -> str:
    """The smallest id of a moment.

    Args:
        moment: The moment; without a time zone it is UTC.
    """
    aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return first_id_of_seconds((aware - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds())


def first_id_of_seconds(seconds: float) -> str:
    """The smallest id of a time in seconds since 1970."""
    return f"{min(max(round(seconds * 1000), 0), _LAST_MILLISECOND):012x}{0:012x}"


def seconds_of(record: str) -> float:
    """The time of an id, in seconds since 1970."""
    return int(record[:12], 16) / 1000


def time_of(record: str) -> str:
    """The time of an id, in UTC, ISO 8601."""
    return as_time(seconds_of(record))


def as_time(seconds: float) -> str:
    """A time in seconds since 1970 in UTC, ISO 8601, with milliseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
