"""What operators said of parts, as an update takes it: images to learn as normal, and patches of defects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.errors import UsageError
from patchcore_plugin.memory_bank import Defects
from patchcore_plugin.operations.update import join_defects
from patchcore_plugin.progress import no_progress
from patchcore_plugin.record import read_said

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.progress import Progress
    from patchcore_plugin.record import SaidImage
    from patchcore_plugin.runtime import PatchcoreRuntime, Prediction

PATCHES_OF_A_DEFECT = 5
"""Most patches of one image's worst region that are taught."""


@dataclass(frozen=True)
class SaidParts:
    """The parts of a record of which an operator has said something, each image once.

    Attributes:
        good: Images of parts that are good, in order of time.
        bad: Images of parts that are bad.
        contradicted: Names of images of which both was said; they are neither good nor bad.
        missing: Names of images that the record has not stored, or that are damaged.
    """

    good: list[SaidImage] = field(default_factory=list)
    bad: list[SaidImage] = field(default_factory=list)
    contradicted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_parts(record: Path, model: str | None = None) -> SaidParts:
    """Read from a record what operators said of one model's answers.

    Args:
        record: Folder of the record.
        model: Name of the model; may be left out where they are all of one.

    Raises:
        RecordError: If the record cannot be read.
        UsageError: If there are answers of several models, or none of which an operator has said anything.
    """
    said = {word: read_said(record, word, model) for word in ("good", "bad")}
    models = sorted({image.model for images in said.values() for image in images})
    if len(models) > 1:
        msg = f"Operators said something of answers of several models: choose one of {', '.join(models)} (--model)."
        raise UsageError(msg)
    if not models:
        of = "" if model is None else f" of the model {model!r}"
        msg = f"No operator has said in {record} that a part{of} is good or bad: there is nothing to learn."
        raise UsageError(msg)
    parts = SaidParts()
    both = {image.sha256 for image in said["good"]} & {image.sha256 for image in said["bad"]}
    seen: set[str] = set()
    for word, kept in {"good": parts.good, "bad": parts.bad}.items():
        for image in said[word]:
            if image.sha256 in seen:
                continue
            seen.add(image.sha256)
            if image.sha256 in both:
                parts.contradicted.append(image.name)
            elif image.content() is None:
                parts.missing.append(image.name)
            else:
                kept.append(image)
    return parts


def find_defect_patches(
    runtime: PatchcoreRuntime, images: Sequence[Path], progress: Progress = no_progress
) -> NDArray[np.float32]:
    """Embed the patches that make parts bad.

    Args:
        runtime: The bundle that is to know them.
        images: Images of bad parts.
        progress: Called as the images are embedded.

    Returns:
        Embeddings (K, D), float32: of each image the farthest patches of its worst region, at most five; of an image without
        a region its farthest patch.

    Raises:
        ImageError: If an image cannot be read.
    """
    found = []
    for done, outcome in enumerate(runtime.stream_outcomes(images), 1):
        if outcome.error is not None:
            raise outcome.error
        progress("embed bad parts", done, len(images))
        rows, columns = _worst_patches(outcome.prediction)
        found.append(outcome.embedding[rows, columns])
    return np.concatenate(found)


def _worst_patches(prediction: Prediction) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the farthest patches of the region with the highest peak."""
    distances = prediction.patch_distances
    if not prediction.map_regions:
        row, column = np.unravel_index(distances.argmax(), distances.shape)
        return np.array([row]), np.array([column])
    region = prediction.map_regions[0]
    rows, columns = (
        (2 * np.arange(cells) + 1) * pixels / (2 * cells)
        for cells, pixels in zip(distances.shape, prediction.anomaly_map.shape, strict=True)
    )
    inside = np.outer(
        (rows >= region.top) & (rows <= region.top + region.height),
        (columns >= region.left) & (columns <= region.left + region.width),
    )
    order = np.argsort(np.where(inside, -distances, np.inf), axis=None, kind="stable")
    return np.unravel_index(order[: max(1, min(PATCHES_OF_A_DEFECT, int(inside.sum())))], distances.shape)


def try_defects(
    runtime: PatchcoreRuntime, defects: NDArray[np.float32], images: Sequence[Path], progress: Progress = no_progress
) -> tuple[list[float], list[float]]:
    """Score test images by a bundle as it is, and as it would be with these defects too.

    Args:
        runtime: The bundle.
        defects: Embeddings (K, D), float32, of patches of defects.
        images: Test images.
        progress: Called as the images are scored.

    Returns:
        Scores of the images before, and after.

    Raises:
        ImageError: If an image cannot be read.
        UsageError: If the bundle would know more than 2,000 patches of defects.
    """
    known = Defects(join_defects(runtime, defects), runtime.manifest.all_members, runtime.bank.threads)
    before, after = [], []
    for done, outcome in enumerate(runtime.stream_outcomes(images), 1):
        if outcome.error is not None:
            raise outcome.error
        progress("try on the test images", done, len(images))
        before.append(outcome.prediction.score)
        after.append(float(runtime.bank.score(outcome.embedding[None], runtime.rule, known).image[0]))
    return before, after
