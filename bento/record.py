"""The record of a process: which answers are written, with which images."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import anyio

from patchcore_plugin.record import Answer, RecordWriter
from patchcore_plugin.record.ids import make_id

from .logs import logger

if TYPE_CHECKING:
    from pathlib import Path

    from .metrics import Metrics
    from .schemas import ImageAnswer
    from .settings import Settings

_READERS = 2  # searches at once: a long one leaves the other cores to the images


class AnswerRecord:
    """The record, as the settings describe it. A thread of its own writes it.

    Args:
        folder: Folder of the record.
        settings: The settings.
        metrics: Metrics that show what is lost.

    Attributes:
        folder: Folder of the record.
        limit: Largest size of the record, in bytes.
        readers: Limit for threads that read the record.
    """

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self.folder, self.limit = folder, settings.record_size << 20
        self.readers = anyio.CapacityLimiter(_READERS)
        self._images = settings.record_images
        self._writer = RecordWriter(
            folder,
            days=settings.record_days,
            limit=self.limit,
            on_loss=lambda what: metrics.record_lost.labels(what=what).inc(),
            on_state=lambda works: metrics.record_failing.set(not works),
            log=logger,
        )

    def add(self, name: str, content: bytes, answer: ImageAnswer, request_id: str) -> str | None:
        """Hand an answer over to the thread that writes.

        Args:
            name: Name of the image file.
            content: Its bytes.
            answer: Its answer.
            request_id: Id of the request.

        Returns:
            Id of the answer; None if too many answers wait to be written.
        """
        keep = self._images == "all" or (self._images == "not_normal" and answer.verdict != "normal")
        entry = Answer(
            record=make_id(),
            request_id=request_id,
            name=name,
            sha256=hashlib.sha256(content).hexdigest(),
            fields=answer.model_dump(exclude={"record", "heatmap"}),
            image=content if keep else None,
        )
        return entry.record if self._writer.put(entry) else None

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._writer.close()
