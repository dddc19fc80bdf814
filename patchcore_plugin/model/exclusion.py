"""Images that a training leaves out, by a list of their paths."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.data import AnomalibDataModule

from patchcore_plugin.errors import UsageError
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

_NAMED = 5


def leave_out(trainer: Trainer, file: Path) -> None:
    """Take the listed images out of the training and the validation set of a trainer's data module, before they are read.

    The log says how many images were left out, and which listed ones are in neither set.

    Args:
        trainer: The trainer; its data module is set up.
        file: List of paths, one a line.

    Raises:
        UsageError: If the list cannot be read, the data module is none of anomalib, or all training images are listed.
    """
    listed = read_list(file)
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, AnomalibDataModule):
        msg = "exclude takes images out of a data module of anomalib, such as Folder: leave them out of other data yourself."
        raise UsageError(msg)
    counts, found = {}, set()
    for name in ("train", "val"):
        subset = getattr(datamodule, f"{name}_data", None)
        if "image_path" not in getattr(subset, "samples", ()):
            continue
        keys = subset.samples["image_path"].map(_key)
        drop = keys.isin(listed.keys())
        if name == "train" and len(drop) and drop.all():
            msg = f"{file} lists all {len(drop)} training images: none is left."
            raise UsageError(msg)
        found.update(keys[drop])
        counts[name] = int(drop.sum())
        subset.samples = subset.samples[~drop]
    if not trainer.is_global_zero:
        return
    logger.info(
        "Left out %d training and %d validation images that %s lists.", counts.get("train", 0), counts.get("val", 0), file
    )
    missing = [path for key, path in listed.items() if key not in found]
    if missing:
        names = ", ".join(map(as_line, missing[:_NAMED])) + (" ..." if len(missing) > _NAMED else "")
        logger.warning(
            "%d of %d images that %s lists are neither training nor validation images: %s",
            len(missing), len(listed), file, names,
        )  # fmt: skip


def read_list(file: Path) -> dict[str, str]:
    """Read a list of paths, one a line; empty lines count for nothing.

    Returns:
        The lines, by the real path that each of them means.

    Raises:
        UsageError: If the list cannot be read.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        msg = f"exclude: {file} cannot be read: {error.strerror}."
        raise UsageError(msg) from error
    lines = filter(None, (line.rstrip("\r") for line in text.split("\n")))
    if "\0" in text:
        msg = f"exclude: {file} is no list of paths, one a line in UTF-8: it has null bytes."
        raise UsageError(msg)
    return {_key(file.parent / line): line for line in lines}


def _key(path: str | Path) -> str:
    """The one form of all paths of a file."""
    return os.path.normcase(os.path.realpath(path))
