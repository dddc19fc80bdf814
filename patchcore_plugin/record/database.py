"""The database of a record: its tables, and how it is opened."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from patchcore_plugin.record.errors import RecordError
from patchcore_plugin.record.images import remove_unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "answers.sqlite"
"""Name of the database in the record's folder."""

_APPLICATION = 0x50434F52  # marks the file as a record's
_FORMAT = 1  # one more with each change of the tables
_BUSY_SECONDS = 5.0  # to wait for another process that writes
_CHECK_SECONDS = 5.0  # for the check of a whole database at the start; a large one is checked in part

# An index begins with the word: SQLite puts rows without one first, so that they are the first ones to go.
_TABLES = """
CREATE TABLE answers (
    id TEXT PRIMARY KEY,
    time TEXT NOT NULL,
    request_id TEXT NOT NULL,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    score REAL,
    ratio REAL,
    verdict TEXT,
    p_value REAL,
    details TEXT NOT NULL,
    image_type TEXT,
    image_bytes INTEGER,
    word TEXT,
    note TEXT,
    word_time TEXT
);
CREATE INDEX answers_by_word ON answers (word, id);
CREATE INDEX answers_by_verdict ON answers (verdict, id);
CREATE INDEX answers_by_hour ON answers (substr(time, 1, 13), model, verdict, word);
CREATE INDEX images_by_word ON answers (word, id, image_bytes, image_type) WHERE image_bytes IS NOT NULL;
CREATE TABLE usage (image_bytes INTEGER NOT NULL);
INSERT INTO usage VALUES (0);
CREATE TRIGGER image_added AFTER INSERT ON answers WHEN NEW.image_bytes IS NOT NULL
    BEGIN UPDATE usage SET image_bytes = image_bytes + NEW.image_bytes; END;
CREATE TRIGGER image_changed AFTER UPDATE OF image_bytes ON answers
    BEGIN UPDATE usage SET image_bytes = image_bytes + ifnull(NEW.image_bytes, 0) - ifnull(OLD.image_bytes, 0); END;
CREATE TRIGGER image_removed AFTER DELETE ON answers WHEN OLD.image_bytes IS NOT NULL
    BEGIN UPDATE usage SET image_bytes = image_bytes - OLD.image_bytes; END;
"""


def prepare(folder: Path) -> None:
    """Make a record where there is none, check one that is there, and remove images whose answer was never written.

    Args:
        folder: Folder of the record.

    Raises:
        RecordError: If the record cannot be written, is damaged, or is of another program or of a newer version.
    """
    with closing(open_database(folder, create=True)) as connection:
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            raise _error(folder, "its file system has no shared memory, as network drives have none")
        _check(connection, folder)
        try:
            with transaction(connection):  # a read-only database can be opened, and not written
                connection.execute("UPDATE usage SET image_bytes = (SELECT ifnull(sum(image_bytes), 0) FROM answers)")
            known = {name for (name,) in connection.execute("SELECT id FROM answers WHERE image_bytes IS NOT NULL")}
            remove_unknown(folder, known)
        except (sqlite3.Error, OSError) as error:
            raise _error(folder, f"it cannot be written: {error}") from error


def open_database(folder: Path, *, create: bool = False) -> sqlite3.Connection:
    """Open the database of a record; transactions are begun by :func:`transaction`.

    Args:
        folder: Folder of the record.
        create: Make folder and tables where there are none.

    Raises:
        RecordError: If it cannot be opened, or is no record that this version knows.
    """
    path = Path(folder).absolute() / FILE
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            msg = f"There is no record in {folder}: it has no {FILE}."
            raise RecordError(msg)
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode={'rwc' if create else 'rw'}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
    except (OSError, sqlite3.Error) as error:
        raise _error(folder, f"it cannot be opened: {error}") from error
    try:
        _check_or_make_tables(connection, folder, create)
        # A commit waits for the disk: the last second is all that is lost when the current fails, too.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {4 << 20}")
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise _error(folder, f"its {FILE} cannot be read: {error}") from error
        raise
    return connection


def _check_or_make_tables(connection: sqlite3.Connection, folder: Path, create: bool) -> None:
    application, version, tables = _marks(connection)
    if create and (application, version, tables) == (0, 0, 0):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table, or it has no effect
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            if _marks(connection)[2] == 0:  # else another process was faster
                for statement in _statements(_TABLES):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_FORMAT}")
        application, version, _ = _marks(connection)
    if (application, version, tables) == (0, 0, 0) and not create:
        raise _error(folder, f"its {FILE} is empty")
    if application != _APPLICATION or version < 1:
        raise _error(folder, f"its {FILE} is of another program")
    if version > _FORMAT:
        msg = (
            f"The record {folder} is of a newer version of patchcore-plugin (format {version}; this version knows "
            f"{_FORMAT}). Update patchcore-plugin, or choose another folder."
        )
        raise RecordError(msg)


def _marks(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """What says whose database it is: application, version, and the number of tables."""
    return tuple(
        connection.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _check(connection: sqlite3.Connection, folder: Path) -> None:
    """Refuse a damaged database."""
    deadline = time.monotonic() + _CHECK_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = "ok" if time.monotonic() > deadline else str(error)
    finally:
        connection.set_progress_handler(None, 0)
    if found != "ok":
        raise _error(folder, f"its {FILE} is damaged: {found}")


def _error(folder: Path, reason: str) -> RecordError:
    return RecordError(f"The record {folder} cannot be used: {reason}. Move it away, or choose another folder.")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write all of it, or nothing. Other processes wait meanwhile."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # some errors have ended the transaction
            connection.execute("ROLLBACK")
        raise
