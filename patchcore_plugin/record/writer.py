"""A thread that writes answers into the record, beside the requests: none of them waits for the disk."""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from patchcore_plugin.record.database import FILE, open_database
from patchcore_plugin.record.writing import Answer, make_room, remove_old, write_answers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

WAITING_ANSWERS = 10_000
"""Largest number of answers that wait for the disk; further ones are lost."""

WAITING_BYTES = 64 << 20
"""Largest size of the images that wait for the disk; further answers wait without their image."""

_SECONDS_TO_WRITE = 0.5  # an answer waits no longer for others, to be written with them
_SECONDS_TO_RETRY = 2.0
_SECONDS_TO_REMOVE = 60.0  # between two looks for answers that are too old
_ANSWERS_AT_ONCE = 100  # few, so that the log of a transaction stays small beside the limit of size


class RecordWriter:
    """Writes answers from any thread into a record. A disk that is full, or fails, loses answers and delays none.

    Args:
        folder: Folder of the record, which :func:`.database.prepare` has made.
        days: Age up to which answers are kept.
        limit: Largest size of the record, in bytes.
        on_loss: Function that is called with ``"answer"`` or ``"image"`` for each one that is lost.
        on_state: Function that is called with whether the record can be written, when that changes.
        log: Logger for what an operator should know.
    """

    def __init__(
        self,
        folder: Path,
        *,
        days: float,
        limit: int,
        on_loss: Callable[[str], object] = lambda what: None,
        on_state: Callable[[bool], object] = lambda works: None,
        log: logging.Logger = logger,
    ) -> None:
        self._folder, self._days, self._limit = folder, days, limit
        self._on_loss, self._on_state, self._log = on_loss, on_state, log
        self._waiting: deque[Answer] = deque()
        self._waiting_bytes = 0  # of their images
        self._lost, self._lost_at = 0, -math.inf  # answers and images that the log does not tell of yet; when the last was
        self._failed = False
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # which file the connection is of
        self._removed_at = -math.inf
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._wake.set()  # what is too old goes at the start
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def put(self, answer: Answer) -> bool:
        """Hand over an answer. Never waits for the disk.

        Returns:
            Whether it will be written; False if too many wait.
        """
        with self._lock:
            size = len(answer.image or b"")
            accepted = len(self._waiting) < WAITING_ANSWERS and not self._closing.is_set()
            fits = self._waiting_bytes + size <= WAITING_BYTES
            if accepted:
                self._waiting.append(answer if fits else replace(answer, image=None))
                self._waiting_bytes += size if fits else 0
        if not (accepted and fits):
            self._lose("image" if accepted else "answer", 1, "the disk is slower than the inspection")
        self._wake.set()
        return accepted

    def close(self, seconds: float = 5.0) -> None:
        """Write what waits, for some seconds at most, and end the thread."""
        self._closing.set()
        self._wake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(_SECONDS_TO_REMOVE)
            self._closing.wait(_SECONDS_TO_WRITE)  # further answers are written with the first
            self._wake.clear()
            if not self._try_to_write():
                self._closing.wait(_SECONDS_TO_RETRY)
                self._wake.set()
        if not self._try_to_write() and self._waiting:
            self._lose("answer", len(self._waiting), "the service has ended")
        self._disconnect()

    def _try_to_write(self) -> bool:
        """Write what waits, and remove what is too old; False if the disk, or the database, does not allow it."""
        try:
            self._connect()
            while self._waiting:
                self._write_some()
            if time.monotonic() - self._removed_at >= _SECONDS_TO_REMOVE:
                remove_old(self._connection, self._folder, self._days)
                make_room(self._connection, self._folder, self._limit)
                self._removed_at = time.monotonic()
        except Exception as error:  # whatever it is: the thread must not end
            self._disconnect()
            self._say_state(error)
            return False
        self._say_state(None)
        return True

    def _write_some(self) -> None:
        """Write the answers that have waited longest. They leave the queue when they are written."""
        batch = self._next_batch()
        try:
            make_room(self._connection, self._folder, self._limit, sum(len(answer.image or b"") for answer in batch))
            errors = write_answers(self._connection, self._folder, batch)
        except (OSError, sqlite3.Error):
            raise
        except Exception as error:  # a bug: these answers would raise it for ever
            self._lose("answer", len(batch), repr(error))
            errors = []
        if errors:
            self._lose("image", len(errors), str(errors[0]))
        with self._lock:
            for answer in batch:
                self._waiting.popleft()
                self._waiting_bytes -= len(answer.image or b"")

    def _next_batch(self) -> list[Answer]:
        with self._lock:
            waiting = list(islice(self._waiting, _ANSWERS_AT_ONCE))
        batch, size = waiting[:1], len(waiting[0].image or b"")
        for answer in waiting[1:]:
            size += len(answer.image or b"")
            if size > self._limit / 20:  # room is made for all of them at once
                break
            batch.append(answer)
        return batch

    def _connect(self) -> None:
        """Open the database, also where another file has come in its place, or it was deleted."""
        with suppress(OSError):
            about = (self._folder / FILE).stat()
            if self._connection is not None and self._file == (about.st_dev, about.st_ino):
                return
        self._disconnect()
        self._connection = open_database(self._folder, create=True)
        about = (self._folder / FILE).stat()
        self._file = about.st_dev, about.st_ino

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _lose(self, what: str, count: int, reason: str) -> None:
        """Count what is lost, and say the first in the log."""
        with self._lock:
            first = self._lost == 0 and not self._failed
            self._lost, self._lost_at = self._lost + count, time.monotonic()
        if first:
            self._log.warning("The record %s loses %ss; the inspection goes on: %s", self._folder, what, reason)
        for _ in range(count):
            self._on_loss(what)

    def _say_state(self, error: Exception | None) -> None:
        """Say in the log, once each time, that the record cannot be written, and that it goes on."""
        with self._lock:
            lost, failed = self._lost, self._failed
            self._failed = error is not None
            goes_on = not self._failed and (failed or lost > 0) and time.monotonic() - self._lost_at > _SECONDS_TO_RETRY
            if goes_on:
                self._lost = 0
        if error is not None and not failed:
            self._log.error("The record %s cannot be written; the inspection goes on: %s", self._folder, error)
            self._on_state(False)
        if failed and not error:
            self._on_state(True)
        if goes_on:
            self._log.warning("The record %s goes on; %d answers or images were lost", self._folder, lost)
