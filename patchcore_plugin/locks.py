"""A lock between processes, which the system gives back when its process ends, however it does; on Windows too."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def try_lock(file: Path) -> sqlite3.Connection | None:
    """Take a lock.

    The file is an empty SQLite database: SQLite locks files in the way of each system. It may stay behind.

    Args:
        file: File of the lock; it is made if there is none.

    Returns:
        The lock, which :meth:`close` gives back; None while another process has it.

    Raises:
        sqlite3.Error: If the file cannot be written, or is no such file.
    """
    connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        connection.close()
        if "locked" in str(error):
            return None
        raise
    except BaseException:
        connection.close()
        raise
    return connection
