"""Renames that succeed on Windows too, where neither a file that is open can be renamed or replaced, nor its folder.

Virus scanners and search indexes open new files for a moment, just when a bundle or a table is whole and goes to its place.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if os.name == "nt" else ()  # seconds; elsewhere a refusal stays one


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder; on Windows for up to three seconds, while it is open.

    Args:
        source: What to rename.
        target: Its new path.

    Raises:
        OSError: If it cannot be renamed; on Windows FileExistsError where something is at the target.
    """
    _patiently(source.rename, target)


def replace(source: Path, target: Path) -> None:
    """Move a file to a path, in place of the one that is there; on Windows for up to three seconds, while one is open.

    Args:
        source: File to move.
        target: Its new path.

    Raises:
        OSError: If it cannot be moved.
    """
    _patiently(source.replace, target)


def _patiently(move: Callable[[Path], object], target: Path) -> None:
    for pause in _PAUSES:
        try:
            move(target)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    move(target)
