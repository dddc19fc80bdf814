"""Which files of a folder are new and finished.

A folder on a network share gives no events, so the folder is looked at again and again. A file is known by its path, its
size and the time of its last change: a camera that reuses a name is answered again.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from patchcore_plugin.drawings import is_drawing
from patchcore_plugin.images import SUFFIXES
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LONGEST_PAUSE = 10.0  # seconds until a file that cannot be read yet is tried again
_LONGEST_PUT_OFF = 60.0  # the same, of a file that cannot be answered

logger = logging.getLogger(__name__)


class FileId(NamedTuple):
    """What tells a file from the one that had its name before.

    Attributes:
        size: Size in bytes.
        changed: Time of the last change, in nanoseconds.
    """

    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileId:
        """The id of the file that a status is of."""
        return cls(status.st_size, status.st_mtime_ns)


def identify(path: Path) -> FileId:
    """The id of a file as its own disk knows it.

    The list of a folder may lag behind: Windows writes a size into it when the file is closed, and NFS keeps it for some
    seconds. A file that is opened is asked for anew.

    Raises:
        OSError: If the file cannot be opened, as while another program on Windows holds it alone.
    """
    with path.open("rb") as file:
        return FileId.of(os.fstat(file.fileno()))


@dataclass
class _Waiting:
    """A file that is not answered yet.

    Attributes:
        id: Its id at the last look.
        first: When the file was seen first, by the monotonic clock.
        since: Since when the id is the same.
        failed: When the file could not be read for the first time; None if it was not tried.
        retry: When it is tried again.
        pause: Seconds between the last try and that.
    """

    id: FileId
    first: float
    since: float
    failed: float | None = None
    retry: float = 0.0
    pause: float = 0.25


class Looks:
    """Looks at a folder, and remembers what it saw.

    Args:
        folder: The folder.
        settle: Seconds for which a file has to stay the same before it counts as finished.
        patience: Seconds for which a file that cannot be read is tried again.

    Attributes:
        drawings: Pictures that this package drew, such as heatmaps, which are not answered.
    """

    def __init__(self, folder: Path, *, settle: float, patience: float) -> None:
        self.folder, self._settle, self._patience = folder, settle, patience
        self._waiting: dict[str, _Waiting] = {}
        self._left_out: set[str] = set()
        self.drawings: dict[str, FileId] = {}

    def look(self, answered: Mapping[str, FileId]) -> tuple[dict[str, FileId], list[str]]:
        """Look at the folder.

        Args:
            answered: Files that are answered already.

        Returns:
            All images by their paths below the folder; and the finished ones among those not answered, the oldest first.

        Raises:
            OSError: If the folder cannot be read.
        """
        listed = dict(self._list())
        now = time.monotonic()
        new = {name: found for name, found in listed.items() if answered.get(name) != found}
        self._waiting = {name: waiting for name, waiting in self._waiting.items() if name in new}
        ready = []
        for name, found in new.items():
            waiting = self._waiting.get(name)
            if waiting is None or waiting.id != found:
                self._wait_for(name, found, now)
            elif now - waiting.since >= self._settle and now >= waiting.retry and not self._is_drawing(name, found):
                ready.append(name)
        ready.sort(key=lambda name: (new[name].changed, name))
        return listed, ready

    def is_unchanged(self, name: str, found: FileId) -> bool:
        """Whether a file is still the one that was looked at; if not, it is waited for anew.

        Raises:
            OSError: If it has gone, or cannot be opened.
        """
        now_found = identify(self.folder / name)
        if now_found != found:
            self._wait_for(name, now_found, time.monotonic())
        return now_found == found

    def _wait_for(self, name: str, found: FileId, now: float) -> None:
        before = self._waiting.get(name)
        self._waiting[name] = _Waiting(found, now if before is None else before.first, now)

    def is_restless(self, name: str) -> bool:
        """Whether a file still changes, although there is no more patience with it."""
        waiting = self._waiting.get(name)
        return waiting is not None and waiting.since - waiting.first > self._patience

    def note_failure(self, name: str, *, gone: bool) -> bool:
        """Note that a finished file cannot be read; returns whether there is no more patience with it.

        Args:
            name: The file.
            gone: The system says that there is no such file; if the next look still lists it, its path may be too long.
        """
        now, waiting = time.monotonic(), self._waiting.get(name)
        if waiting is None:
            return False
        if waiting.failed is None:
            waiting.failed = now
            if gone:
                return False
        last = waiting.failed + self._patience
        waiting.retry, waiting.pause = min(now + waiting.pause, last), min(_LONGEST_PAUSE, 2 * waiting.pause)
        return now >= last

    def put_off(self, name: str) -> None:
        """Let a file wait for a while, longer each time, so that others come before it."""
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.pause = min(_LONGEST_PUT_OFF, 4 * waiting.pause)
            waiting.retry = time.monotonic() + waiting.pause

    def _is_drawing(self, name: str, found: FileId) -> bool:
        """Whether a file is a picture that this package drew; its name is that of the image, with an ending added."""
        if name.count(".") < 2:
            return False
        if self.drawings.get(name) == found:
            return True
        if is_drawing(self.folder / name):
            self.drawings[name] = found
            return True
        return False

    def _list(self) -> Iterator[tuple[str, FileId]]:
        """The images below the folder, as :func:`patchcore_plugin.folders.list_files` finds them, only faster.

        Links are followed, and come last: what lies below the folder itself keeps its own name.
        """
        folders, links = deque([""]), deque()
        visited: set[tuple[int, int]] = set()
        while folders or links:
            inside = folders.popleft() if folders else links.popleft()
            path = self.folder / inside
            try:
                status = path.stat()
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(path) as entries:
                    listed = [entry for entry in entries if not entry.name.startswith(".")]
            except OSError as error:
                if not inside:
                    raise
                self._leave_out(inside, f"it cannot be read ({error.strerror})")
                continue
            for entry in listed:
                name = f"{inside}/{entry.name}" if inside else entry.name
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(name)
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122 - a Path takes ten times as long
                        status = entry.stat()
                        if not stat.S_ISREG(status.st_mode):
                            self._leave_out(name, "it is no regular file")
                        elif not self._is_copy(entry):
                            yield name, FileId.of(status)
                except OSError as error:
                    if entry.is_symlink():
                        self._leave_out(name, f"the link cannot be followed ({error.strerror})")

    def _is_copy(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file is a link to another one below the folder, which is found without it."""
        return entry.is_symlink() and Path(os.path.realpath(entry.path)).is_relative_to(os.path.realpath(self.folder))

    def _leave_out(self, name: str, reason: str) -> None:
        if name not in self._left_out and len(self._left_out) < 1000:
            self._left_out.add(name)
            logger.warning("%s is left out: %s.", as_line(str(self.folder / name)), reason)
