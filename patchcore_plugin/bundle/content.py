"""The content of a bundle's files, read once: what is compared with a checksum is what is used.

A bundle may be replaced while it is read, and may be made to harm. So a file is opened once, a named pipe or a device is
refused before anything waits for it, and every reader works on the bytes that were read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from patchcore_plugin.bundle.manifest import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAPPED_FILE_BYTES = 2**28 if os.name != "nt" else sys.maxsize
"""Size from which a file is mapped into memory instead of read; on Windows none is, as nothing could replace it."""

_ARRAY_HEADER_LIMIT = 1000  # bytes; np.save writes 118 for our arrays
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9]{1,2})', 'fortran_order': False, 'shape': \(([0-9]{1,18}(?:, [0-9]{1,18})*),?\), \} *\n"
)


class FileState(NamedTuple):
    """What changes when a file is written or replaced.

    Attributes:
        modified: Time of the last change, in nanoseconds.
        bytes: Size.
        number: The file system's number of the file.
    """

    modified: int
    bytes: int
    number: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state that the system reports of a file."""
        return cls(status.st_mtime_ns, status.st_size, status.st_ino)


@dataclass(frozen=True)
class FileContent:
    """What a file held when it was read.

    Attributes:
        path: Path of the file.
        data: Its bytes. Those of a large file are mapped into memory, and stay those of this file if another one takes
            its path.
        state: State of the file when it was opened.
    """

    path: Path
    data: bytes | mmap.mmap
    state: FileState

    @cached_property
    def sha256(self) -> str:
        """Checksum, in lower-case hexadecimal digits."""
        return hashlib.sha256(self.data).hexdigest()


@contextmanager
def opened_folder(path: Path) -> Iterator[int | None]:
    """Open a folder, so that all files read from it are those of one folder, even if another one takes its path.

    Yields:
        The descriptor of the folder; None where the system cannot open files relative to one.

    Raises:
        OSError: If there is no such folder.
    """
    if os.open not in os.supports_dir_fd:
        yield None
        return
    descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(
    path: Path, folder: int | None = None, *, bytes_limit: float = math.inf, mapped_from: int = MAPPED_FILE_BYTES
) -> FileContent:
    """Read a file.

    Args:
        path: Path of the file.
        folder: Descriptor of the folder that the file lies in, from :func:`opened_folder`.
        bytes_limit: Largest size of the file.
        mapped_from: Size, in bytes, from which the file is mapped into memory.

    Raises:
        OSError: If the file is missing or cannot be read.
        BundleError: If it is a folder, a pipe or a device, or too large.
    """
    # Opening a named pipe without O_NONBLOCK would wait until something writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    descriptor = os.open(path, flags) if folder is None else os.open(path.name, flags, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            msg = f"{path} is damaged: it is not a regular file."
            raise BundleError(msg)
        if status.st_size > bytes_limit:
            msg = f"{path} is damaged: it is larger than {bytes_limit} bytes."
            raise BundleError(msg)
        if status.st_size >= max(1, mapped_from):
            data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        else:
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                data = stream.read(status.st_size)
    finally:
        os.close(descriptor)
    return FileContent(path, data, FileState.of(status))


def parse_json(file: FileContent) -> Any:
    """The value in a JSON file that may be damaged or made to harm.

    Raises:
        BundleError: If the file is damaged.
    """
    try:
        return json.loads(bytes(file.data))
    except (ValueError, RecursionError, MemoryError) as error:
        msg = f"{file.path} is damaged: {error}"
        raise BundleError(msg) from error


def parse_array(file: FileContent) -> NDArray:
    """The NumPy array in a file (.npy) that may be damaged or made to harm.

    NumPy evaluates the header of such a file as Python's literals. Here the header must be one that ``np.save`` writes for
    an array of numbers in C order.

    Returns:
        The array, read-only; its memory is that of ``file.data``.

    Raises:
        BundleError: If the file is damaged, or holds Python objects.
    """
    data = file.data
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _ARRAY_HEADER.fullmatch(data[10:end]) if end <= _ARRAY_HEADER_LIMIT else None
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        msg = f"{file.path} is damaged: it does not begin as an array of numbers that np.save wrote."
        raise BundleError(msg)
    shape = tuple(map(int, header[2].split(b", ")))
    try:
        dtype = np.dtype(header[1].decode())
    except TypeError as error:
        msg = f"{file.path} is damaged: {error}"
        raise BundleError(msg) from error
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(data) - end:
        msg = f"{file.path} is damaged: it does not hold {dtype} values of shape {shape}."
        raise BundleError(msg)
    return np.frombuffer(data, dtype, math.prod(shape), end).reshape(shape)
