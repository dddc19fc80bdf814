"""What is written into a record: answers, operators' words; and what goes from it, by age and size."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from patchcore_plugin.names import as_text
from patchcore_plugin.record.database import open_database, transaction
from patchcore_plugin.record.errors import OtherImageError, RecordError, UnknownAnswerError
from patchcore_plugin.record.ids import as_time, first_id_of_seconds, time_of
from patchcore_plugin.record.images import image_path, image_type, remove_image, write_image

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Word = Literal["good", "bad"]

FIELDS = ("model", "version", "score", "ratio", "verdict", "p_value")
"""Fields of an answer that have columns of their own; the others are in the column ``details``, as JSON."""

_DAY = 24 * 3600
_ROWS_AT_ONCE = 500  # to remove in a transaction: no other process waits for long
_LOG_BYTES = 4 << 20  # size of the database's log, at which SQLite writes it into the database
_ROOM = 0.95  # of the limit is left full when something must go, so that not every answer pushes one out

_INSERT = (
    "INSERT OR IGNORE INTO answers (id, time, request_id, name, sha256, model, version, score, ratio, verdict, p_value, "
    "details, image_type, image_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True)
class Answer:
    """An answer on its way into the record.

    Attributes:
        record: Its id, of :func:`.ids.make_id`.
        request_id: Id of the request.
        name: Name of the image file.
        sha256: Checksum of the image file's bytes.
        fields: All fields of the answer, those of :data:`FIELDS` among them.
        image: Bytes of the image file; None stores no image.
    """

    record: str
    request_id: str
    name: str
    sha256: str
    fields: Mapping[str, Any]
    image: bytes | None = None


def write_answers(connection: sqlite3.Connection, folder: Path, answers: Sequence[Answer]) -> list[OSError]:
    """Write answers, those that are there already left alone.

    Returns:
        Why images could not be written. Their answers are, as those without an image.

    Raises:
        sqlite3.Error: If the answers cannot be written; none is then.
    """
    rows, errors = [], []
    for answer in answers:
        ending = size = None
        if answer.image is not None:
            ending, size = image_type(answer.image), len(answer.image)
            try:
                write_image(image_path(folder, answer.record, ending), answer.image)
            except OSError as error:
                ending = size = None
                errors.append(error)
        columns = [answer.fields.get(name) for name in FIELDS]
        details = {name: value for name, value in answer.fields.items() if name not in FIELDS}
        texts = as_text(answer.request_id), as_text(answer.name), answer.sha256
        rows.append((answer.record, time_of(answer.record), *texts, *columns, json.dumps(details), ending, size))
    with transaction(connection):
        connection.executemany(_INSERT, rows)
    return errors


def say(folder: Path, record: str, word: Word, note: str, image: bytes | None, limit: int) -> dict[str, Any]:
    """Write an operator's word of a part beside its answer, in place of an earlier word.

    Args:
        folder: Folder of the record.
        record: Id of the answer.
        word: Whether the part is good or bad.
        note: What the operator remarks.
        image: Bytes of the image file, in case that the record lacks it; or None.
        limit: Largest size of the record, in bytes.

    Returns:
        ``record``, ``word``, ``note``, ``time`` of the word, and whether the record has the ``image``.

    Raises:
        UnknownAnswerError: If the record has no such answer.
        OtherImageError: If the image is not the one that was answered.
        RecordError: If the record cannot be opened.
        sqlite3.Error: If the word cannot be written.
    """
    moment = as_time(time.time())
    with closing(open_database(folder)) as connection:
        query = "SELECT sha256, image_type FROM answers WHERE id = ?"
        row = connection.execute(query, (record,)).fetchone()
        if row is None:
            msg = f"The record has no answer {record!r}."
            raise UnknownAnswerError(msg)
        if image is not None and hashlib.sha256(image).hexdigest() != row[0]:
            msg = f"The image is not the one of the answer {record!r}: their bytes differ."
            raise OtherImageError(msg)
        with transaction(connection):
            changed = connection.execute(
                "UPDATE answers SET word = ?, note = ?, word_time = ? WHERE id = ?", (word, as_text(note), moment, record)
            ).rowcount
        if not changed:  # it went by age or size meanwhile
            msg = f"The record has no answer {record!r}."
            raise UnknownAnswerError(msg)
        stored = row[1] is not None and image_path(folder, record, row[1]).is_file()
        if image is not None and not stored:
            stored = _add_image(connection, folder, record, image, limit)
    return {"record": record, "word": word, "note": note, "time": moment, "image": stored}


def _add_image(connection: sqlite3.Connection, folder: Path, record: str, image: bytes, limit: int) -> bool:
    """Store the image of an answer; False if it cannot be written."""
    ending = image_type(image)
    try:
        make_room(connection, folder, limit, len(image))
        write_image(image_path(folder, record, ending), image)
    except OSError:
        return False
    with transaction(connection):
        query = "UPDATE answers SET image_type = ?, image_bytes = ? WHERE id = ?"
        return connection.execute(query, (ending, len(image), record)).rowcount == 1


def remove_old(connection: sqlite3.Connection, folder: Path, days: float) -> None:
    """Remove answers that are older than a number of days, with their images.

    Raises:
        sqlite3.Error: If the database cannot be written.
    """
    limit = first_id_of_seconds(time.time() - days * _DAY)
    query = "SELECT id, image_type FROM answers WHERE id < ? ORDER BY id LIMIT ?"
    while _remove(connection, folder, query, limit, _ROWS_AT_ONCE):
        pass
    _shrink(connection)


def make_room(connection: sqlite3.Connection, folder: Path, limit: int, needed: int = 0) -> None:
    """Remove what is too much: the oldest first, and what an operator has said something of last.

    Answers may take half of the limit, and images what answers leave of it. So neither pushes the other out.

    Args:
        connection: The database.
        folder: Folder of the record.
        limit: Largest size of the record, in bytes.
        needed: Bytes of images that are about to be written.

    Raises:
        sqlite3.Error: If the database cannot be written.
    """
    if (size := _size(connection)) > limit / 2:
        while size > _ROOM * limit / 2:
            (rows,) = connection.execute("SELECT max(rowid) - min(rowid) FROM answers").fetchone()  # about
            too_many = int((rows or 0) * (1 - _ROOM * limit / 2 / size))
            query = "SELECT id, image_type FROM answers ORDER BY word, id LIMIT ?"
            if not _remove(connection, folder, query, min(max(too_many, 1), _ROWS_AT_ONCE)):
                break
            size = _size(connection)
        _shrink(connection)
    (images,) = connection.execute("SELECT image_bytes FROM usage").fetchone()
    if (wanted := size + images + needed + _LOG_BYTES) > limit:
        _remove_images(connection, folder, wanted - _ROOM * limit)


def _remove_images(connection: sqlite3.Connection, folder: Path, too_much: float) -> None:
    """Remove images until some bytes are free; their answers stay."""
    query = "SELECT id, image_type, image_bytes FROM answers WHERE image_bytes IS NOT NULL ORDER BY word, id LIMIT ?"
    while too_much > 0:
        chosen = []
        with transaction(connection):
            for record, ending, size in connection.execute(query, (_ROWS_AT_ONCE,)).fetchall():
                chosen.append((record, ending))
                too_much -= size
                if too_much <= 0:
                    break
            connection.executemany(
                "UPDATE answers SET image_type = NULL, image_bytes = NULL WHERE id = ?", [(record,) for record, _ in chosen]
            )
        if not chosen:
            return
        _remove_files(folder, chosen)


def _remove(connection: sqlite3.Connection, folder: Path, query: str, *values: Any) -> int:
    """Remove the answers whose ids and kinds of images a query finds, with their images; returns their number."""
    with transaction(connection):
        found = connection.execute(query, values).fetchall()
        connection.executemany("DELETE FROM answers WHERE id = ?", [(record,) for record, _ in found])
    _remove_files(folder, [(record, ending) for record, ending in found if ending is not None])
    return len(found)


def _remove_files(folder: Path, images: Iterable[tuple[str, str]]) -> None:
    for record, ending in images:
        with suppress(RecordError):  # of a kind that no service has written
            remove_image(image_path(folder, record, ending))


def _size(connection: sqlite3.Connection) -> int:
    """Bytes that the answers take in the database's file."""
    pages, free, page_size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * page_size


def _shrink(connection: sqlite3.Connection) -> None:
    """Give free pages of the database's file back to the disk."""
    connection.executescript("PRAGMA incremental_vacuum")  # execute() would free a single page
