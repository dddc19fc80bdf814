"""The delivery of events, by a thread that nobody waits for."""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from patchcore_plugin.http_client import HttpError, Reply, pause_after, send
from patchcore_plugin.locks import try_lock
from patchcore_plugin.webhook.events import to_json
from patchcore_plugin.webhook.queue import EventQueue, QueuedEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from patchcore_plugin.webhook.events import Receiver

_SECONDS_FOR_A_REQUEST = 10.0
_LOOK_SECONDS = 1.0  # until events of other processes, or the end of the process that delivers, are seen
_TRIM_SECONDS = 10.0
_DISK_SECONDS = 10.0  # until a disk that failed is tried again
_DOWN = frozenset({408, 425, 429})  # statuses below 500 that say nothing about the event

logger = logging.getLogger("patchcore.webhook")


class Webhook:
    """Tells a receiver of events, at least once each, in order while the receiver takes them.

    Of all processes that share a queue, one delivers. If it ends, another one goes on. A status of 2xx means that the
    receiver has the event. Anything else is tried again until the event is a week old:

    - No connection, no answer in 10 s, no HTTP, or the statuses 408, 425, 429 and 5xx: the receiver is down. Nothing is sent
      for a while, which doubles each time from 1 s to 5 minutes, or as long as Retry-After says, 5 minutes at most.
    - Any other status, a redirect too: the event is refused. It waits behind all others, while those are sent.

    Args:
        receiver: Where to send.
        file: File of the queue; a file of the same name with ``.lock`` added is the lock of the process that delivers.
        count: Called with the name of what happened to an event, and how often: ``queued``, ``delivered``, ``failed``,
            ``refused``, ``dropped`` (too old, or too many), ``lost`` (the disk is full).
        waiting: Called with the number of events in the queue, by the process that delivers.
        first_pause: Seconds to wait after the first failure.
        longest_pause: Longest such wait.

    Raises:
        QueueError: If the queue cannot be opened.
    """

    def __init__(
        self,
        receiver: Receiver,
        file: Path,
        *,
        count: Callable[[str, int], object] = lambda name, number: None,
        waiting: Callable[[int], object] = lambda number: None,
        first_pause: float = 1.0,
        longest_pause: float = 300.0,
    ) -> None:
        self.queue = EventQueue(file)
        self._receiver, self._count, self._report_waiting = receiver, count, waiting
        self._pauses = first_pause, longest_pause
        self._lock_file = file.with_name(f"{file.name}.lock")
        self._failures = self._refusals = 0
        self._down_until = self._refused_until = 0.0
        self._trim_at = self._report_at = 0.0
        self._lost_at = -_DISK_SECONDS
        self._wake, self._idle, self._end = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def tell(self, event: Mapping[str, Any]) -> bool:
        """Put an event into the queue. It never waits for the receiver, and never fails.

        Args:
            event: Event that :func:`make_event` made.

        Returns:
            Whether the event is in the queue; False if it is lost, as the disk is full.
        """
        try:
            self.queue.put(event["id"], to_json(event))
        except sqlite3.Error as error:
            self._count("lost", 1)
            if time.monotonic() - self._lost_at >= _DISK_SECONDS:
                self._lost_at = time.monotonic()
                logger.error("Events of the webhook are lost: %s cannot be written: %s", self.queue.file, error)
            return False
        self._count("queued", 1)
        self._idle.clear()
        self._wake.set()
        return True

    def close(self, seconds: float = 5.0) -> int:
        """Deliver what is in the queue while the receiver takes it, and end.

        Args:
            seconds: Longest time.

        Returns:
            Number of events that stay in the queue, for the next start.
        """
        with suppress(sqlite3.Error):
            if len(self.queue):
                self._wake.set()
                self._idle.wait(seconds)
        self._end.set()
        self._wake.set()
        self._thread.join(1.0)
        try:
            return len(self.queue)
        except sqlite3.Error:
            return 0

    def _work(self) -> None:
        lock = None
        while not self._end.is_set():
            self._wake.clear()
            try:
                lock = lock or try_lock(self._lock_file)
                pause = self._next() if lock else _LOOK_SECONDS
            except Exception as error:  # without this thread nobody would be told of anything any more
                logger.error("The webhook cannot deliver from its queue %s: %r", self.queue.file, error)
                self._idle.set()
                self._end.wait(_DISK_SECONDS)
                continue
            if pause > 0:
                self._wake.wait(min(pause, _LOOK_SECONDS))
        if lock:
            lock.close()

    def _next(self) -> float:
        """Deliver the next event; returns the seconds until there may be another one to deliver."""
        now = time.monotonic()
        if now >= self._trim_at:
            self._trim_at = now + _TRIM_SECONDS
            self._trim()
        if now >= self._report_at:
            self._report_at = now + _LOOK_SECONDS
            self._report_waiting(len(self.queue))
        if now < self._down_until:
            self._idle.set()
            return self._down_until - now
        event = self.queue.first(fresh=now < self._refused_until)
        if event is None:
            self._idle.set()
            return _LOOK_SECONDS
        try:
            reply = self._send(event)
        except HttpError as error:
            self._note_down(str(error), None)
        else:
            self._note(event, reply)
        return 0.0

    def _send(self, event: QueuedEvent) -> Reply:
        headers = self._receiver.headers(event.id, int(time.time()), event.body)
        return send(self._receiver.url, event.body, headers, seconds=_SECONDS_FOR_A_REQUEST)

    def _note(self, event: QueuedEvent, reply: Reply) -> None:
        if 200 <= reply.status < 300:
            self.queue.remove(event)
            self._count("delivered", 1)
            if self._failures or self._refusals:
                logger.warning("The webhook's receiver takes events again.")
            self._failures = self._refusals = 0
            self._refused_until = 0.0
        elif reply.status >= 500 or reply.status in _DOWN:
            self._note_down(f"status {reply.status}", reply.seconds_to_wait())
        else:
            self._count("refused", 1)
            self.queue.count_refusal(event)
            self._failures = 0
            self._refusals += 1
            pause = pause_after(self._refusals, *self._pauses, None, random.random())  # noqa: S311
            self._refused_until = time.monotonic() + pause
            if self._refusals.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
                text = "The webhook's receiver refuses events, %d so far, with status %d; they are tried again in %.0f s."
                logger.error(text, self._refusals, reply.status, pause)

    def _note_down(self, reason: str, wanted: float | None) -> None:
        self._count("failed", 1)
        self._failures += 1
        pause = pause_after(self._failures, *self._pauses, wanted, random.random())  # noqa: S311
        self._down_until = time.monotonic() + pause
        text = "The webhook's receiver is down (%s). %d events wait; the next try is in %.0f s."
        logger.warning(text, reason, len(self.queue), pause)

    def _trim(self) -> None:
        dropped = self.queue.trim()
        if dropped:
            self._count("dropped", dropped)
            logger.error("%d events of the webhook are dropped: too many, or a week old, and not delivered.", dropped)
