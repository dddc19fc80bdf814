"""Results as lines of a file: CSV, or JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from patchcore_plugin.errors import UsageError
from patchcore_plugin.names import as_text, to_cell

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Format = Literal["csv", "jsonl"]

NUMBERS = "score", "normalized_score", "p_value", "verdict", "threshold", "ratio", "model", "version"
COLUMNS = "time", "image", *NUMBERS, "heatmap", "moved_to", "error"
_TEXTS = {"image", "model", "heatmap", "moved_to", "error"}


def to_line(result: Mapping[str, Any], form: Format) -> bytes:
    """A result as a line, its end included.

    Args:
        result: Values by column; of a JSON line further ones too, such as the regions.
        form: Form of the line.
    """
    if form == "jsonl":
        return json.dumps(result, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    cells = {name: to_cell(str(value)) if name in _TEXTS and value else value for name, value in result.items()}
    stream = io.StringIO()
    csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(cells)
    return stream.getvalue().encode()


def make_result(name: str, fields: Mapping[str, Any], **more: str | None) -> dict[str, Any]:
    """The result for an image.

    Args:
        name: Path of the image below the folder that is watched.
        fields: The answer, as ``/predict`` gives it; empty if there is none.
        **more: The values of ``heatmap``, ``moved_to`` and ``error``.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    texts = {column: as_text(more[column]) if more.get(column) else None for column in ("heatmap", "moved_to", "error")}
    result = {"time": now, "image": as_text(name), **{column: fields.get(column) for column in NUMBERS}, **texts}
    return {**result, **{name: fields.get(name) for name in ("regions", "small_regions", "size")}}


def header(form: Format) -> bytes:
    """What a file of results begins with."""
    return (",".join(COLUMNS) + "\n").encode() if form == "csv" else b""


def check_file(file: Path, form: Format) -> None:
    """Refuse a file that is there already, and was not written by a watch.

    Raises:
        UsageError: If it was not.
        OSError: If it cannot be written.
    """
    expected = header(form) or b'{"time":'
    if file.exists():
        with file.open("r+b") as earlier:
            begin = earlier.read(len(expected))
        if begin and not expected.startswith(begin):
            msg = f"{file} is there already, and was not written by patchcore watch. Choose another --output."
            raise UsageError(msg)


def append(file: Path, size: int, lines: bytes, form: Format) -> int:
    """Append lines to a file of results, in such a way that it may be repeated after a kill at any moment.

    Args:
        file: The file. Where it is missing, or shorter than it was, as it was moved away, it begins anew.
        size: Its size before.
        lines: The lines.
        form: Their form, for the header of a new file.

    Returns:
        Its size afterwards.

    Raises:
        OSError: If the file cannot be written, as when the disk is full, or a spreadsheet holds it.
    """
    with file.open("a+b") as stream:
        end = stream.seek(0, io.SEEK_END)
        size = min(size, end)
        content = lines if size else header(form) + lines
        stream.seek(size)
        tail = stream.read(len(content) + 1)
        if content.startswith(tail):  # nothing, or what a killed process had written of it
            missing = content[len(tail) :]
        elif tail.startswith(content):  # all of it, and lines that somebody else added
            missing = b""
        else:  # somebody else changed the file: nothing of it is lost
            stream.seek(max(0, end - len(lines)))
            last = stream.read()
            missing = b"" if last == lines else lines if last.endswith(b"\n") else b"\n" + lines
        if missing:
            stream.write(missing)
            stream.flush()
            os.fsync(stream.fileno())
        return stream.seek(0, io.SEEK_END)
