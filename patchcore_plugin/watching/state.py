"""What a watch has answered: a SQLite database, whose rows are the truth, and what is still to be done for them.

An answer is one transaction: the file counts as answered, and its line, its event and its move are put down. What follows
(the line is appended, the event told, the file moved) can be repeated, and is, until it has been done: so a process may be
killed at any moment, a file of results may be open in a spreadsheet, and a disk may be full.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.names import as_line
from patchcore_plugin.watching.looks import FileId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

_FORMAT = 1
_DAYS_KEPT = 7  # of a file that has gone: a share that is away for some time must not be answered again
_SCHEMA = """
CREATE TABLE IF NOT EXISTS watched (folder BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS answered (
    name BLOB PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, missing_since REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lines (
    number INTEGER PRIMARY KEY, results TEXT NOT NULL, line BLOB NOT NULL, drawn BLOB, heatmap BLOB
);
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, event BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (name TEXT PRIMARY KEY, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS moves (
    number INTEGER PRIMARY KEY, name BLOB NOT NULL, size INTEGER NOT NULL, changed INTEGER NOT NULL, target BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS targets ON moves (target);
"""


class StateError(PatchcoreError):
    """The state cannot be used: another watch has it, or it is of another folder, or no state at all."""


class Answered(NamedTuple):
    """A file that is answered, and what is to be done for it.

    Attributes:
        name: Path of the file below the folder that is watched.
        id: Its id.
        line: Line of the results.
        drawn: File that holds the heatmap until the line is written; None without a heatmap.
        heatmap: File of the heatmap afterwards.
        event: Event for the webhook, as JSON; None without one.
        target: Where the file is to be moved to; None leaves it where it is.
    """

    name: str
    id: FileId
    line: bytes
    drawn: str | None = None
    heatmap: str | None = None
    event: bytes | None = None
    target: str | None = None


class Line(NamedTuple):
    """A line that is not written yet; attributes as of :class:`Answered`."""

    line: bytes
    drawn: str | None
    heatmap: str | None


class Move(NamedTuple):
    """A file that is to be moved.

    Attributes:
        name: Its path below the folder that is watched.
        id: Its id; a file of the same name with another id is another one.
        target: Its path below the folder that it is moved to.
        number: Number of the row.
    """

    name: str
    id: FileId
    target: str
    number: int = 0


class State:
    """The state of a watch. As long as it is open, no other process can open it.

    Args:
        file: File of the state; it is made if there is none.
        folder: Folder that is watched.

    Attributes:
        answered: Id of every file that is answered, by its path below the folder.

    Raises:
        StateError: If it cannot be opened; the message names the file and the way out.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=0, isolation_level=None)
            with self._closed_on_error():
                self._open(os.fsencode(folder.resolve()))
                self.answered = {
                    os.fsdecode(name): FileId(size, changed)
                    for name, size, changed in self._database.execute("SELECT name, size, changed FROM answered")
                }
        except (OSError, sqlite3.Error) as error:
            msg = f"{file} cannot be opened: {error}. Choose another --output."
            if "locked" in str(error):
                msg = f"Another patchcore watch is at work in {file.parent}. End it, or choose another --output."
            raise StateError(msg) from error

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._database.close()
            raise

    def _open(self, folder: bytes) -> None:
        # Exclusive before WAL: the lock holds until the end, and nothing is shared by memory, so a network share will do.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("BEGIN EXCLUSIVE")
        (found,) = self._database.execute("PRAGMA user_version").fetchone()
        if found not in (0, _FORMAT):
            msg = f"{self.file} was written by a newer version of patchcore-plugin. Choose another --output."
            raise StateError(msg)
        for statement in _SCHEMA.split(";\n"):
            self._database.execute(statement)
        self._database.execute(f"PRAGMA user_version={_FORMAT}")
        row = self._database.execute("SELECT folder FROM watched").fetchone()
        if row is None:
            self._database.execute("INSERT INTO watched VALUES (?)", (folder,))
        elif row[0] != folder:
            msg = (
                f"{self.file.parent} holds the results of another folder, {as_line(os.fsdecode(row[0]))}. "
                "Choose another --output."
            )
            raise StateError(msg)
        self._database.execute("COMMIT")

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All of the changes, or none.

        Args:
            durable: Wait until the disk has them: a power failure takes nothing back. Only what is not done again needs it.

        Raises:
            sqlite3.OperationalError: If the disk is full.
        """
        self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._database.execute("BEGIN")
        try:
            yield self._database
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def answer(self, answers: Sequence[Answered], results: str) -> None:
        """Note that files are answered, and what is to be done for them: all, or none.

        Args:
            answers: The files.
            results: Name of the file of results that their lines are for.

        Raises:
            sqlite3.OperationalError: If the disk is full: no file is answered.
        """
        with self._transaction(durable=True) as database:
            for one in answers:
                name, drawn, heatmap, target = (
                    None if path is None else os.fsencode(path) for path in (one.name, one.drawn, one.heatmap, one.target)
                )
                database.execute("INSERT OR REPLACE INTO answered VALUES (?, ?, ?, NULL)", (name, *one.id))
                values = results, one.line, drawn, heatmap
                database.execute("INSERT INTO lines (results, line, drawn, heatmap) VALUES (?, ?, ?, ?)", values)
                if one.event is not None:
                    database.execute("INSERT INTO events (event) VALUES (?)", (one.event,))
                if target is not None:
                    values = name, *one.id, target
                    database.execute("INSERT INTO moves (name, size, changed, target) VALUES (?, ?, ?, ?)", values)
        self.answered.update((one.name, one.id) for one in answers)

    def lines(self, results: str, most: int = 1000) -> list[Line]:
        """The lines that are not written yet to a file of results, in order."""
        query = "SELECT line, drawn, heatmap FROM lines WHERE results = ? ORDER BY number LIMIT ?"
        return [
            Line(line, drawn and os.fsdecode(drawn), heatmap and os.fsdecode(heatmap))
            for line, drawn, heatmap in self._database.execute(query, (results, most))
        ]

    def unfinished_results(self) -> list[str]:
        """Names of the files of results that lack lines."""
        return [name for (name,) in self._database.execute("SELECT DISTINCT results FROM lines")]

    def size_of(self, results: str) -> int:
        """Size of a file of results, as far as it is known to be written."""
        row = self._database.execute("SELECT size FROM results WHERE name = ?", (results,)).fetchone()
        return 0 if row is None else row[0]

    def note_written(self, results: str, size: int, count: int) -> None:
        """Note that the first lines for a file of results are written, and its size with them."""
        first = "SELECT number FROM lines WHERE results = ? ORDER BY number LIMIT ?"
        with self._transaction() as database:
            database.execute(f"DELETE FROM lines WHERE number IN ({first})", (results, count))  # noqa: S608
            database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (results, size))

    def events(self, most: int = 1000) -> list[tuple[int, bytes]]:
        """Number and event of the first that the webhook is still to be told."""
        return self._database.execute("SELECT number, event FROM events ORDER BY number LIMIT ?", (most,)).fetchall()

    def note_told(self, numbers: Sequence[int]) -> None:
        """Note that the webhook has events in its queue."""
        with self._transaction() as database:
            database.executemany("DELETE FROM events WHERE number = ?", [(number,) for number in numbers])

    def is_target(self, target: str) -> bool:
        """Whether a file is to be moved to a place."""
        query = "SELECT EXISTS (SELECT 1 FROM moves WHERE target = ?)"
        return bool(self._database.execute(query, (os.fsencode(target),)).fetchone()[0])

    def moves(self, most: int) -> list[Move]:
        """The first moves that are still to be done."""
        return [
            Move(os.fsdecode(name), FileId(size, changed), os.fsdecode(target), number)
            for number, name, size, changed, target in self._database.execute(
                "SELECT * FROM moves ORDER BY number LIMIT ?", (most,)
            )
        ]

    def change_target(self, move: Move, target: str) -> None:
        """Move a file to another place than was meant, as something has appeared there."""
        with self._transaction() as database:
            database.execute("UPDATE moves SET target = ? WHERE number = ?", (os.fsencode(target), move.number))

    def note_moved(self, moves: Sequence[Move]) -> None:
        """Note that files have left the folder, so that nothing need be known of them any more."""
        left = [move for move in moves if self.answered.get(move.name) == move.id]
        with self._transaction() as database:
            database.executemany("DELETE FROM moves WHERE number = ?", [(move.number,) for move in moves])
            database.executemany("DELETE FROM answered WHERE name = ?", [(os.fsencode(move.name),) for move in left])
        for move in left:
            self.answered.pop(move.name, None)

    def forget_missing(self, listed: Collection[str], now: float | None = None) -> None:
        """Forget files that have been gone for a week, so that the state does not grow without end.

        Args:
            listed: Files that are there.
            now: The time, in seconds since 1970.
        """
        now = time.time() if now is None else now
        known = dict(self._database.execute("SELECT name, missing_since FROM answered WHERE missing_since IS NOT NULL"))
        gone = {os.fsencode(name) for name in self.answered if name not in listed}
        old = [name for name in gone if name in known and now - known[name] > 86_400 * _DAYS_KEPT]
        with self._transaction() as database:
            database.executemany(
                "UPDATE answered SET missing_since = NULL WHERE name = ?", [(name,) for name in known.keys() - gone]
            )
            database.executemany(
                "UPDATE answered SET missing_since = ? WHERE name = ?", [(now, name) for name in gone - known.keys()]
            )
            database.executemany("DELETE FROM answered WHERE name = ?", [(name,) for name in old])
        for name in old:
            del self.answered[os.fsdecode(name)]

    def close(self) -> None:
        """Close the state, so that another process can open it."""
        self._database.close()
