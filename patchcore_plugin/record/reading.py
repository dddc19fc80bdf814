"""What is read from a record: answers by time, totals by hour, images, and operators' words."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchcore_plugin.record.database import open_database
from patchcore_plugin.record.errors import RecordError, UnknownAnswerError
from patchcore_plugin.record.ids import as_time, first_id, seconds_of
from patchcore_plugin.record.images import CONTENT_TYPES, image_path, read_verified
from patchcore_plugin.record.writing import FIELDS, Word

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

NONE = "none"
"""Verdict of answers without one, and word of answers of which no operator has said anything."""

_COLUMNS = (
    "id AS record",
    "time",
    "request_id",
    "name",
    "sha256",
    *FIELDS,
    "details",
    "image_bytes IS NOT NULL AS image",
    "word",
    "note",
    "word_time",
)


@dataclass(frozen=True)
class Filter:
    """Which answers to read.

    Attributes:
        model: Only those of this model.
        verdict: Only those with this verdict; ``"none"``: those without one.
        since: Only those at this time or later; without a time zone it is UTC.
        until: Only those before this time.
        feedback: Only those of which an operator has said this; ``"any"``: has said anything; ``"none"``: nothing.
    """

    model: str | None = None
    verdict: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    feedback: Literal["good", "bad", "any", "none"] | None = None

    def conditions(self) -> tuple[list[str], list[Any]]:
        """Conditions in SQL, and their values."""
        found = []
        if self.model is not None:
            found.append(("model = ?", self.model))
        if self.verdict is not None:
            found.append(("verdict IS ?", None if self.verdict == NONE else self.verdict))
        if self.since is not None:
            found.append(("id >= ?", first_id(self.since)))
        if self.until is not None:
            found.append(("id < ?", first_id(self.until)))
        if self.feedback == "any":
            found.append(("word IS NOT ?", None))
        elif self.feedback is not None:
            found.append(("word IS ?", None if self.feedback == NONE else self.feedback))
        return [condition for condition, _ in found], [value for _, value in found]


def read_history(
    folder: Path, wanted: Filter, limit: int, before: str | None = None, *, seconds: float = 60.0
) -> list[dict[str, Any]]:
    """Read answers, the newest first.

    Args:
        folder: Folder of the record.
        wanted: Which answers.
        limit: Largest number of answers.
        before: Id of an answer: only earlier ones are read. Answers that come later change nothing behind it.
        seconds: Longest time to search.

    Returns:
        For each answer its id (``record``), ``time``, ``request_id``, ``name``, ``sha256``, whether its ``image`` is stored,
        ``feedback`` (``word``, ``note`` and ``time``, or None), and ``answer`` with the fields of the answer itself.

    Raises:
        RecordError: If the record cannot be read.
        TimeoutError: If it takes longer.
    """
    conditions, values = wanted.conditions()
    if before is not None:
        conditions.append("id < ?")
        values.append(before)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    query = f"SELECT {', '.join(_COLUMNS)} FROM answers {where} ORDER BY id DESC LIMIT ?"  # noqa: S608 - texts of this file
    with _reading(folder, seconds) as connection:
        return [_entry(row) for row in connection.execute(query, (*values, limit))]


def _entry(row: sqlite3.Row) -> dict[str, Any]:
    said = None if row["word"] is None else {"word": row["word"], "note": row["note"], "time": row["word_time"]}
    return {
        **{name: row[name] for name in ("record", "time", "request_id", "name", "sha256")},
        "image": bool(row["image"]),
        "feedback": said,
        "answer": {**{name: row[name] for name in FIELDS}, **_details(row)},
    }


def _details(row: sqlite3.Row) -> dict[str, Any]:
    details = json.loads(row["details"])
    if not isinstance(details, dict):
        msg = f"the details of the answer are no object: {row['details'][:80]!r}"
        raise ValueError(msg)  # noqa: TRY004 - not of the caller
    return details


def read_totals(folder: Path, wanted: Filter, *, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Count answers by hour, model and verdict.

    Args:
        folder: Folder of the record.
        wanted: Which answers; the hours of ``since`` and ``until`` are counted whole.
        seconds: Longest time to count.

    Returns:
        For each ``hour`` (when it begins, UTC, ISO 8601), ``model`` and ``verdict`` the number of ``answers``, and of how
        many of them an operator has said that the part is ``good`` or ``bad``, in order of time.

    Raises:
        RecordError: If the record cannot be read.
        TimeoutError: If it takes longer.
    """
    hour = "substr(time, 1, 13)"  # as its index has it
    conditions, values = Filter(wanted.model, wanted.verdict, feedback=wanted.feedback).conditions()
    if wanted.since is not None:
        conditions.append(f"{hour} >= ?")
        values.append(as_time(seconds_of(first_id(wanted.since)))[:13])
    if wanted.until is not None:
        conditions.append(f"{hour} <= ?")  # the hour of the last millisecond before
        values.append(as_time(max(seconds_of(first_id(wanted.until)) - 0.001, 0))[:13])
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    counts = "count(*) AS answers, ifnull(sum(word = 'good'), 0) AS good, ifnull(sum(word = 'bad'), 0) AS bad"
    columns = f"{hour} || ':00:00Z' AS hour, model, verdict, {counts}"
    query = f"SELECT {columns} FROM answers {where} GROUP BY {hour}, model, verdict"  # noqa: S608 - texts of this file
    with _reading(folder, seconds) as connection:
        return [dict(row) for row in connection.execute(query, values)]


def read_image(folder: Path, record: str, *, seconds: float = 60.0) -> tuple[bytes, str] | None:
    """Read the stored image of an answer.

    Args:
        folder: Folder of the record.
        record: Id of the answer.
        seconds: Longest time to search.

    Returns:
        Bytes and content type; None if the image is not stored, or not as it was sent.

    Raises:
        UnknownAnswerError: If the record has no such answer.
        RecordError: If the record cannot be read.
    """
    with _reading(folder, seconds) as connection:
        row = connection.execute("SELECT sha256, image_type FROM answers WHERE id = ?", (record,)).fetchone()
    if row is None:
        msg = f"The record has no answer {record!r}."
        raise UnknownAnswerError(msg)
    path = _path(folder, record, row["image_type"])
    content = None if path is None else read_verified(path, row["sha256"])
    return None if content is None else (content, CONTENT_TYPES[row["image_type"]])


@dataclass(frozen=True)
class SaidImage:
    """An answer of which an operator has said whether the part is good or bad.

    Attributes:
        record: Id of the answer.
        time: When the image was answered, UTC, ISO 8601.
        word: ``"good"`` or ``"bad"``.
        note: What the operator remarked.
        name: Name of the image file as it was sent; not a path, and not unique.
        sha256: Checksum of the image file's bytes.
        model: Name of the model that answered.
        version: Its version.
        verdict: Its verdict; None if it has no threshold.
        regions: Its regions, as the service answers them; None without a threshold.
        path: The stored image file; None if the image is not stored.
    """

    record: str
    time: str
    word: Word
    note: str
    name: str
    sha256: str
    model: str
    version: str
    verdict: str | None
    regions: list[dict[str, Any]] | None
    path: Path | None

    def content(self) -> bytes | None:
        """The bytes of the image file as it was sent; None if they are not stored, or damaged."""
        return None if self.path is None else read_verified(self.path, self.sha256)


def read_said(folder: Path, word: Word, model: str | None = None) -> list[SaidImage]:
    """Read of which parts operators have said that they are good, or bad.

    Args:
        folder: Folder of the record.
        word: Which of the two.
        model: Only answers of this model.

    Returns:
        The answers, in order of time. The same image may be there several times; ``sha256`` tells.

    Raises:
        RecordError: If the record cannot be read.

    Example:
        >>> [image.path for image in read_said(Path("record"), "good") if image.path]  # doctest: +SKIP
    """
    conditions, values = Filter(model, feedback=word).conditions()
    columns = "id, time, word, note, name, sha256, model, version, verdict, details, image_type"
    query = f"SELECT {columns} FROM answers WHERE {' AND '.join(conditions)} ORDER BY id"  # noqa: S608 - texts of this file
    with _reading(folder, float("inf")) as connection:
        return [
            SaidImage(
                record=row["id"],
                **{name: row[name] for name in columns.split(", ")[1:-2]},
                regions=_details(row).get("regions"),
                path=_path(folder, row["id"], row["image_type"]),
            )
            for row in connection.execute(query, values)
        ]


def _path(folder: Path, record: str, ending: str | None) -> Path | None:
    return None if ending is None else image_path(Path(folder), record, ending)


@contextmanager
def _reading(folder: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """A connection that writes nothing, and whose queries end in time."""
    deadline = time.monotonic() + seconds
    with closing(open_database(folder)) as connection:
        connection.execute("PRAGMA query_only = ON")
        connection.row_factory = sqlite3.Row
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        try:
            yield connection
        except (sqlite3.Error, ValueError) as error:  # the latter of text that is no JSON
            if time.monotonic() > deadline:
                msg = f"The search in the record took longer than {seconds:g} seconds."
                raise TimeoutError(msg) from error
            msg = f"The record {folder} cannot be read: {error}"
            raise RecordError(msg) from error
