"""The queue of events: a SQLite database that several processes share, and that outlives all of them."""

from __future__ import annotations

import sqlite3
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from pathlib import Path

MOST_EVENTS = 100_000
MOST_DAYS = 7

_FORMAT = 1
_BUSY_SECONDS = 0.5  # a transaction takes a thousandth of it
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    added REAL NOT NULL,
    refusals INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS next_event ON events (refusals, number);
"""


class QueueError(PatchcoreError):
    """The queue's file cannot be opened; the message names it and the way out."""


class QueuedEvent(NamedTuple):
    """An event that waits.

    Attributes:
        number: Its number in the queue.
        id: Its id.
        refusals: How many times the receiver has refused it.
        body: The bytes to send.
    """

    number: int
    id: str
    refusals: int
    body: bytes


class EventQueue:
    """Events in the order in which they came. Threads may share it.

    An event is in the queue before :meth:`put` returns, and stays there when the process is killed. A power failure may
    take those of the last moment with it.

    Args:
        file: File of the queue; it is made if there is none. It must lie on a disk of this computer, as SQLite's log in
            shared memory does not work over a network.

    Raises:
        QueueError: If the file cannot be written, or is no queue.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # whoever puts an event never waits for the one who delivers, and writes to the disk for good
            self._puts, self._rest = _Connection(file), _Connection(file)
            with self._puts as database:
                (found,) = database.execute("PRAGMA user_version").fetchone()
                if found not in (0, _FORMAT):
                    msg = f"{file} was written by a newer version of patchcore-plugin. Choose another file for the queue."
                    raise QueueError(msg)
                database.execute("PRAGMA journal_mode=WAL")
                database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_FORMAT}; COMMIT;")
        except (OSError, sqlite3.Error) as error:
            msg = f"The webhook's queue {file} cannot be opened: {error}. Choose another file, or delete this one."
            raise QueueError(msg) from error

    def put(self, event_id: str, body: bytes) -> None:
        """Add an event; one whose id is in the queue already stays as it is.

        Raises:
            sqlite3.Error: If the disk is full, or does not answer in half a second.
        """
        with self._puts as database:
            database.execute(
                "INSERT OR IGNORE INTO events (id, added, body) VALUES (?, ?, ?)", (event_id, time.time(), body)
            )

    def first(self, *, fresh: bool) -> QueuedEvent | None:
        """The next event: of those refused least often the oldest; None if there is none.

        Args:
            fresh: Only an event that was never refused.
        """
        limit = "WHERE refusals = 0" if fresh else ""
        query = f"SELECT number, id, refusals, body FROM events {limit} ORDER BY refusals, number LIMIT 1"  # noqa: S608
        with self._rest as database:
            row = database.execute(query).fetchone()
        return None if row is None else QueuedEvent(*row)

    def remove(self, event: QueuedEvent) -> None:
        """Take out an event that was delivered."""
        with self._rest as database:
            database.execute("DELETE FROM events WHERE number = ?", (event.number,))

    def count_refusal(self, event: QueuedEvent) -> None:
        """Put an event behind those that were refused less often."""
        with self._rest as database:
            database.execute("UPDATE events SET refusals = refusals + 1 WHERE number = ?", (event.number,))

    def trim(self, most_events: int = MOST_EVENTS, most_days: float = MOST_DAYS) -> int:
        """Drop the oldest events beyond the limits, and give room on the disk back; returns how many were dropped."""
        query = "DELETE FROM events WHERE added < ? OR number <= (SELECT MAX(number) FROM events) - ?"
        with self._rest as database:
            # a clock that was set back leaves times in the future: such events count as of today
            database.execute("UPDATE events SET added = ? WHERE added > ?", (time.time(), time.time() + 86_400))
            dropped = database.execute(query, (time.time() - 86_400 * most_days, most_events)).rowcount
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return dropped

    def __len__(self) -> int:
        with self._rest as database:
            return database.execute("SELECT COUNT(*) FROM events").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        for connection in (self._puts, self._rest):
            with connection as database:
                database.close()


class _Connection:
    """A connection that threads take in turn. They wait for each other here: SQLite would look again only now and then."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("PRAGMA wal_autocheckpoint=0")  # see EventQueue.trim

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        return self._database

    def __exit__(self, *_: object) -> None:
        self._lock.release()
