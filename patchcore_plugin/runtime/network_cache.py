"""Compiled networks, kept on disk for the next start.

OpenVINO's own cache does not notice a damaged file: the scores are then wrong. Here each file begins with a checksum, and
appears whole or not at all.

A checksum does not tell who wrote a file. A compiled network that someone else planted would give other scores, while every
file of the bundle is sound. So only what this user or the administrator (root) alone can write is used: folders are made
with mode 0700, files with 0600, and a folder or a file that others own or can write is not used. On Windows, access is what
the folder inherits from the one above it, and nothing is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import time
import uuid
from typing import TYPE_CHECKING

import openvino as ov

from patchcore_plugin.moving import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_DRAFT_SECONDS_LIMIT = 3600  # age from which a draft counts as left behind by a process that was killed


def cache_file(folder: Path, checksums: Sequence[str], options: dict[str, object], facts: Sequence[object]) -> Path:
    """Name the file that keeps a network, compiled for a device of this machine with these options.

    Args:
        folder: Folder of the cache.
        checksums: Checksums of the network's files.
        options: OpenVINO's properties to compile with.
        facts: What tells the device from others.
    """
    digest = hashlib.sha256(repr([*checksums, ov.__version__, *facts, sorted(options.items())]).encode())
    return folder / f"{digest.hexdigest()[:32]}.blob"


def compile_or_restore(
    core: ov.Core, read: Callable[[], ov.Model], device: str, options: dict[str, object], file: Path | None
) -> ov.CompiledModel:
    """Restore the compiled network from ``file``, or compile it and keep it there.

    A file that is damaged, cannot be written, or could be written by others costs the time of compiling, and nothing else.

    Args:
        core: OpenVINO.
        read: Reads the network; called only where it has to be compiled.
        device: Device to compile it for.
        options: OpenVINO's properties to compile with.
        file: File that keeps the compiled network; its folder is made. None keeps nothing.

    Raises:
        RuntimeError: If OpenVINO cannot read or compile the network.
    """
    if file is not None and not is_trusted(file.parent):
        logger.warning(
            "%s is not used to keep compiled networks: others own it or can write it. Delete it, or name a folder that does "
            "not exist yet.",
            file.parent,
        )
        file = None
    compiled = None if file is None else _restore(core, file, device, options)
    if compiled is None:
        compiled = core.compile_model(read(), device, options)
        if file is not None:
            _keep(compiled, file)
    return compiled


def is_trusted(folder: Path) -> bool:
    """Whether nobody but this user and root can write a folder; also where there is none yet."""
    try:
        status = folder.stat()
    except OSError:
        return True
    return stat.S_ISDIR(status.st_mode) and _is_own(status)


def _is_own(status: os.stat_result) -> bool:
    if os.name == "nt":
        return True
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _restore(core: ov.Core, file: Path, device: str, options: dict[str, object]) -> ov.CompiledModel | None:
    try:
        content = _read_own(file)
    except OSError:
        return None
    if content is None:
        logger.warning("%s is not used, as others own it or can write it: the network is compiled again.", file)
        return None
    if _digest(file, content[_DIGEST_BYTES:]) != content[:_DIGEST_BYTES]:
        logger.warning("%s is damaged: the network is compiled again.", file)
        return None
    try:
        return core.import_model(bytes(content[_DIGEST_BYTES:]), device, options)
    except RuntimeError as error:
        logger.warning("%s cannot be used, the network is compiled again: %s", file, error)
        return None


def _read_own(file: Path) -> memoryview | None:
    """Content of a file; None if others could have written it.

    Raises:
        OSError: If it cannot be read.
    """
    optional = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(file, os.O_RDONLY | sum(optional))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _is_own(status):
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return memoryview(stream.read())
    finally:
        os.close(descriptor)


def _digest(file: Path, content: bytes | memoryview) -> bytes:
    """Checksum of a compiled network and of the file's name, which says for what network and options it was compiled."""
    digest = hashlib.sha256(file.name.encode())
    digest.update(content)
    return digest.digest()


def _keep(compiled: ov.CompiledModel, file: Path) -> None:
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        content = compiled.export_model().read()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear(file)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(_digest(file, content))
            stream.write(content)
        replace(draft, file)
    except (OSError, RuntimeError) as error:  # a read-only folder, a full disk, a device that gives nothing out
        logger.info("The compiled network is not kept in %s: %s", file.parent, error)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _clear(file: Path) -> None:
    """Remove drafts of a file that were left behind."""
    for draft in file.parent.glob(f".{file.name}.*.tmp"):
        if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS_LIMIT:
            draft.unlink(missing_ok=True)
