"""Windows' rules for open files, on Linux: what this process has open, or mapped, can be neither moved nor removed."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from pathlib import Path


def held_files() -> set[str]:
    """Files that this process has open or mapped."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            if stat.S_ISREG(link.stat().st_mode):
                held.add(str(link.readlink()))
        except FileNotFoundError:  # the folder's own descriptor, or a file that was removed
            continue
    lines = (line.split(None, 5) for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines())
    return held | {parts[5] for parts in lines if len(parts) == 6 and parts[5].startswith("/")}


def obey_windows(monkeypatch) -> None:
    """Let ``os`` refuse what Windows refuses, with its error; nothing where the system does not tell what is open."""
    if not Path("/proc/self/maps").is_file():
        return

    def guarded(function):
        def call(*arguments, dir_fd=None, **options):
            paths = [os.path.abspath(os.fsdecode(path)) for path in arguments if isinstance(path, str | bytes | os.PathLike)]  # noqa: PTH100
            if dir_fd is not None:
                paths = [str(Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fsdecode(arguments[0]))]
                options["dir_fd"] = dir_fd
            for held in held_files():
                if any(held == path or held.startswith(f"{path}/") for path in paths):
                    raise PermissionError(errno.EACCES, "The process cannot access the file, as it is in use", held)
            return function(*arguments, **options)

        return call

    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        guard = guarded(getattr(os, name))
        monkeypatch.setattr(os, name, guard)
        if hasattr(pathlib, "_NormalAccessor") and name != "remove":  # Python 3.10's paths have functions of their own
            monkeypatch.setattr(pathlib._NormalAccessor, name, staticmethod(guard))
