"""Recording sessions: which images were taken together, so that whole sessions are held back for the thresholds."""

from __future__ import annotations

import logging
import posixpath
import random
import re
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from PIL import ExifTags, Image

from patchcore_plugin.bundle import MAX_CALIBRATION
from patchcore_plugin.errors import UsageError
from patchcore_plugin.scoring.conformal import check_sessions, images_needed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

FOLDER = "folder"
"""The value of ``groups`` by which each folder is a session."""

_ANOMALOUS = 1
_SHORT_TIME = timedelta(hours=12)
_DATED_IMAGES = 200  # whose times are read, at most
_NAMES_SHOWN = 10


def check_groups(groups: str) -> None:
    """Refuse what is neither ``"folder"`` nor a regular expression with a capture group.

    Raises:
        UsageError: If the groups are neither.
    """
    hint = (
        f"groups must be {FOLDER!r}, or a regular expression whose first capture group is the session, like '/(day[0-9]+)_'"
    )
    if not isinstance(groups, str):
        msg = f"{hint}, got {groups!r}."
        raise UsageError(msg)
    try:
        captures = re.compile(groups).groups
    except re.error as error:
        msg = f"{hint}, got {groups!r}: {error}."
        raise UsageError(msg) from error
    if groups != FOLDER and not captures:
        msg = f"{hint}, got {groups!r}, which has no capture group: put parentheses around the part that tells the session."
        raise UsageError(msg)


def session_of(path: Any, groups: str) -> str:
    """Name of the session that an image belongs to.

    Args:
        path: Path of the image's file.
        groups: ``"folder"`` for the image's folder, or a regular expression, which is searched in the path written with
            ``/``; its first capture group is the session.

    Raises:
        UsageError: If the image has no path, or the expression does not find a session in it.
    """
    if not isinstance(path, str | Path):
        msg = "groups tells the session by the path of an image, and the validation's images have none."
        raise UsageError(msg)
    if groups == FOLDER:
        return Path(path).parent.as_posix()
    found = re.search(groups, Path(path).as_posix())
    if found is None or not found[1]:
        msg = f"groups={groups!r} finds no session in the path {Path(path).as_posix()}: change the expression, or the name."
        raise UsageError(msg)
    return found[1]


def choose_sessions(counts: Mapping[str, int], share: float, rate: float, seed: int) -> list[str]:
    """Choose the sessions to hold back.

    They are drawn at random, among those with enough images, until about the wanted share of all images is held back. At
    least one is held back, and at least one is not.

    Args:
        counts: Number of normal images of each session.
        share: Share of the images to hold back, in (0, 1).
        rate: False-alarm rate.
        seed: Seed of the draw.

    Returns:
        Names of the sessions, sorted.

    Raises:
        UsageError: If there are fewer than two sessions, or none has enough images.
    """
    if len(counts) < 2:
        names = ", ".join(counts) or "none"
        msg = (
            f"groups finds fewer than two sessions ({names}): one is needed to learn from, another one to hold back. Put "
            f"the images of each session into a folder of its own (groups: {FOLDER}), change the expression, or leave "
            "groups out; then the thresholds hold for this session only."
        )
        raise UsageError(msg)
    large = sorted(name for name, count in counts.items() if count >= images_needed(rate))
    if not large:
        name = max(counts, key=lambda one: counts[one])
        check_sessions({name: counts[name]}, rate)
    wanted, total, held = share * sum(counts.values()), 0, []
    most = min(len(counts) - 1, MAX_CALIBRATION // images_needed(rate))
    random.Random(seed).shuffle(large)  # noqa: S311
    for name in large:
        after = total + counts[name]
        if len(held) < most and abs(after - wanted) < abs(total - wanted):
            held.append(name)
            total = after
    return sorted(held or [min(large, key=lambda name: counts[name])])


def hold_back_sessions(trainer: Trainer, groups: str, rate: float) -> None:
    """Divide a data module's normal images between training and validation by whole sessions.

    With ``val_split_mode: from_train``, anomalib has drawn single images for validation; they are divided anew. In other
    modes, the validation's sessions must not be among the training's.

    Args:
        trainer: Trainer whose data module has been set up.
        groups: What tells the session of an image; see :func:`session_of`.
        rate: False-alarm rate.

    Raises:
        UsageError: If there is no data module of anomalib, or its images cannot be divided so.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, AnomalibDataModule) or not hasattr(datamodule, "val_data"):
        msg = (
            "groups needs a data module of anomalib with a validation set: set val_split_mode to from_train, which holds "
            "whole sessions back, or leave groups out."
        )
        raise UsageError(msg)
    if datamodule.val_split_mode == ValSplitMode.FROM_TRAIN:
        _divide_anew(datamodule, groups, rate)
    samples = datamodule.val_data.samples
    counts = Counter(session_of(path, groups) for path in samples["image_path"][_is_normal(samples)])
    learned = {session_of(path, groups) for path in datamodule.train_data.samples["image_path"]}
    both = sorted(learned & set(counts))
    if both:
        msg = (
            f"Session {both[0]} has images in training and in validation, so that the thresholds would not hold for a new "
            "session. Set val_split_mode to from_train, which holds whole sessions back, or to from_dir, with folders of "
            "other sessions."
        )
        raise UsageError(msg)
    check_sessions(counts, rate)
    if trainer.is_global_zero and counts:
        folder = f"{posixpath.commonpath([*counts, *learned])}/" if groups == FOLDER else ""
        logger.info(
            "Sessions held back for the thresholds: %s (%d normal images). Sessions learned from: %s. Promise: on average, "
            "in at least %d of %d new sessions, at most %g %% of the normal images are called anomalous. The more sessions "
            "are held back (val_split_ratio), the stronger the promise.",
            _listed(counts, folder),
            counts.total(),
            _listed(learned, folder),
            len(counts),
            len(counts) + 1,
            100 * rate,
        )


def _divide_anew(datamodule: AnomalibDataModule, groups: str, rate: float) -> None:
    """Put whole sessions into the validation set, and all other images into the training set."""
    train, val = datamodule.train_data, datamodule.val_data
    samples = pd.concat([train.samples, val.samples], ignore_index=True)
    sessions = samples["image_path"].map(lambda path: session_of(path, groups))
    counts = Counter(sessions[_is_normal(samples)])
    held = choose_sessions(counts, datamodule.val_split_ratio, rate, datamodule.seed or 0)
    for dataset, chosen in ((val, sessions.isin(held)), (train, ~sessions.isin(held))):
        part = samples[chosen]
        part.attrs = dict(dataset.samples.attrs)  # the task among them
        dataset.samples = part


def warn_of_one_session(trainer: Trainer) -> None:
    """Say in the log that thresholds hold for one session only, where all images seem to be of one.

    They do if they lie in one folder, and all their cameras' times (EXIF ``DateTimeOriginal``), or without those the times
    of their files, lie within half a day. Times of files may be those of a copy: the message says which ones it found.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, AnomalibDataModule) or not trainer.is_global_zero:
        return
    subsets = (getattr(datamodule, f"{name}_data", None) for name in ("train", "val"))
    tables = [subset.samples for subset in subsets if "image_path" in getattr(subset, "samples", ())]
    paths = sorted({Path(path) for samples in tables for path in samples["image_path"][_is_normal(samples)]})
    if len({path.parent for path in paths}) != 1:
        return
    paths = paths[:: -(-len(paths) // _DATED_IMAGES)]
    times = [time for path in paths if (time := _time_of_camera(path))]
    if recorded := len(times) == len(paths):
        found = "the camera's times lie within half a day: they seem to be of one recording session"
    else:
        times = [timedelta(seconds=path.stat().st_mtime) for path in paths]  # not every time is one of datetime
        found = "their files' times lie within half a day: they may be of one recording session, or copied together"
    if max(times) - min(times) <= _SHORT_TIME:
        logger.warning(
            "All normal images are in one folder, and %s. %s for this session only, not for another day or camera: record "
            "several sessions, and tell ConformalPostProcessor which image is of which (groups: folder, with one folder for "
            "each session; or a regular expression).",
            found,
            "The thresholds hold" if recorded else "If they are of one, the thresholds hold",
        )


def _time_of_camera(path: Path) -> datetime | None:
    try:
        with Image.open(path) as image:
            text = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        return datetime.strptime(str(text), "%Y:%m:%d %H:%M:%S")
    except Exception:  # damaged files make decoders raise nearly any exception; they are refused later
        return None


def _is_normal(samples: pd.DataFrame) -> pd.Series:
    if "label_index" not in samples:
        return pd.Series(data=True, index=samples.index)
    return samples["label_index"] != _ANOMALOUS


def _listed(names: Iterable[str], folder: str) -> str:
    """Names of sessions for a message, without the folder that they share."""
    ordered = [name.removeprefix(folder) for name in sorted(names)]
    more = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
