"""Files that are moved: never over another one, to another disk too, and again after a kill at any moment."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import stat
from datetime import datetime, timedelta, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from patchcore_plugin.watching.looks import FileId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)  # Windows knows no time before it, and a camera's clock may
_FIRST, _LAST = (
    (end.replace(tzinfo=timezone.utc) - _EPOCH) // timedelta(microseconds=1) for end in (datetime.min, datetime.max)
)


def free_name(folder: Path, name: str, changed: int, is_taken: Callable[[str], bool] = lambda name: False) -> str:
    """A name below a folder at which nothing is: the given one, or one with the time of the file's last change.

    Args:
        folder: The folder.
        name: Path below it, with slashes.
        changed: Time of the last change, in nanoseconds.
        is_taken: Whether a name is meant for another file.
    """
    path = PurePosixPath(name)
    moment = _EPOCH + timedelta(microseconds=min(max(changed // 1000, _FIRST), _LAST))
    stamped = path.with_name(f"{path.stem}.{moment:%Y%m%dT%H%M%S}{path.suffix}")
    candidate, number = path, 1
    while is_taken(str(candidate)) or os.path.lexists(folder / candidate):
        candidate = stamped if number == 1 else stamped.with_name(f"{stamped.stem}-{number}{stamped.suffix}")
        number += 1
    return str(candidate)


def move_file(source: Path, found: FileId, target: Path) -> bool:
    """Move a file, or what is left to do of it after a kill.

    Args:
        source: The file.
        found: Its id. A file that has another one is not moved.
        target: Where to.

    Returns:
        False if another file is at the target.

    Raises:
        OSError: If the file cannot be moved now, as when the disk is full or another program has it open.
    """
    try:
        there = FileId.of(source.stat()) == found
    except FileNotFoundError:
        there = False
    if not there:  # it has been moved, or was deleted or replaced by somebody else
        _remove_reservation(target, found)
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.open("xb").close()  # a rename would replace what is there
    except FileExistsError:
        if not target.is_file():
            return False
        if target.stat().st_size and not filecmp.cmp(source, target, shallow=False):
            return False
        if target.stat().st_size:  # a copy to this disk was whole when the process was killed
            _remove(source)
            return True
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            _remove_reservation(target, found)
            raise
        _move_to_other_disk(source, target)
    return True


def _move_to_other_disk(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        with part.open("r+b") as copy:
            os.fsync(copy.fileno())
        shutil.copystat(source, part)  # last: what is read-only cannot be opened so
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        _remove_reservation(target, FileId.of(source.stat()))
        raise
    _remove(source)


def _remove(file: Path) -> None:
    """Remove a file, on Windows one that is read-only too."""
    try:
        file.unlink()
    except PermissionError:
        if os.name != "nt":
            raise
        file.chmod(stat.S_IWRITE)
        file.unlink()


def _remove_reservation(target: Path, found: FileId) -> None:
    """Remove the empty file that kept a place for a file that is not empty."""
    if found.size and target.is_file() and target.stat().st_size == 0:
        target.unlink()
