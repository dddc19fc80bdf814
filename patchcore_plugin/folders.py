"""The files below a folder, linked ones included, each of them once."""

from __future__ import annotations

import logging
import os
import stat
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Collection

logger = logging.getLogger(__name__)


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """List the files below a folder whose names end in one of some suffixes, hidden files and folders left out.

    Links to files and to folders are followed. A file that several paths lead to is listed once, by a path without a link
    if there is one; so links that lead round in a circle have an end. What cannot be read, or is no regular file, is left
    out with a warning that names it.

    Args:
        folder: Folder to search, its subfolders included.
        suffixes: Endings of file names, in lower case.

    Returns:
        Paths, sorted.
    """
    found: dict[Path, Path] = {}  # the path to each file, by its real path
    visited: set[Path] = set()
    folders, links = [folder], deque()
    while folders or links:
        if not folders:  # links come last: what lies below the folder itself is found without them
            _follow(links.popleft(), suffixes, folders, found)
            continue
        current = folders.pop()
        real = _real(current)
        if real in visited:
            continue
        visited.add(real)
        for entry in _entries(current):
            path = current / entry.name
            if entry.is_symlink():
                links.append(path)
            elif entry.is_dir():
                folders.append(path)
            elif path.suffix.lower() in suffixes:
                _add(path, real / entry.name, found, regular=entry.is_file())
    return sorted(found.values())


def _real(path: Path) -> Path:
    """The path without links, and on Windows without junctions; ``Path.resolve`` raises errors where links are broken."""
    return Path(os.path.realpath(path))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        _leave_out(folder, f"it cannot be read ({error.strerror})")
        return []


def _follow(link: Path, suffixes: Collection[str], folders: list[Path], found: dict[Path, Path]) -> None:
    try:
        mode = link.stat().st_mode
    except OSError as error:
        _leave_out(link, f"the link cannot be followed ({error.strerror})")
        return
    if stat.S_ISDIR(mode):
        folders.append(link)
    elif link.suffix.lower() in suffixes:
        _add(link, _real(link), found, regular=stat.S_ISREG(mode))


def _add(path: Path, real: Path, found: dict[Path, Path], *, regular: bool) -> None:
    if regular:
        found.setdefault(real, path)
    else:
        _leave_out(path, "it is no regular file")


def _leave_out(path: Path, reason: str) -> None:
    logger.warning("%s is left out: %s.", as_line(str(path)), reason)
