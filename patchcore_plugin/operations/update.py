"""The operator's remedy for false alarms: a bundle is extended by new normal images, without training and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import (
    BANK,
    FORMAT_VERSION,
    BundleError,
    Calibration,
    Index,
    Manifest,
    Scale,
    Update,
    atomic_folder,
    copy_files,
    describe_files,
    describe_versions,
    version_of,
    write_manifest,
)
from patchcore_plugin.bundle.origins import Origins, locate_patches, make_thumbnails
from patchcore_plugin.images import read_image
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.memory_bank.growth import farthest_first
from patchcore_plugin.runtime import PatchcoreRuntime, Prediction, self_test
from patchcore_plugin.scoring import Scores, anomaly_map
from patchcore_plugin.scoring.conformal import extend_calibration, set_thresholds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Progress = Callable[[str, int, int], object]

_MEASURED = 64  # held-out images to measure the index with, at most


@dataclass(frozen=True)
class Report:
    """What an update did.

    Attributes:
        update: What the new bundle says of it.
        bank_size: Vectors of the new bank.
        radius: That new patches were covered within, in feature units.
        names: Held-out images.
        before: Their predictions by the old bundle.
        after: Their predictions by the new one.
    """

    update: Update
    bank_size: int
    radius: float
    names: list[str]
    before: list[Prediction]
    after: list[Prediction]

    @property
    def false_alarms(self) -> tuple[int, int]:
        """Held-out images that were called anomalous, before and after."""
        before, after = (sum(answer.verdict == "anomalous" for answer in each) for each in (self.before, self.after))
        return before, after


def update_bundle(
    path: Path,
    images: Sequence[Path],
    output: Path,
    holdout: int = 5,
    progress: Progress = lambda step, done, total: None,
) -> Report:
    """Write a bundle's successor, whose memory bank knows new normal images too.

    The bank is extended as it was built: farthest patch first, from the present vectors, until every patch of the new images
    lies within the covering radius that the bundle records. Some of the images stay out of the bank, to tell what the
    update is worth on images that it has not seen.

    Args:
        path: The bundle to start from; it is not changed.
        images: New normal images.
        output: Folder of the new bundle.
        holdout: Of the images, in order of their names, every so many-th is held out; the last, where there are fewer.
        progress: Called with a step, and how much of it is done.

    Raises:
        BundleError: If the bundle is damaged, or does not record its covering radius; or if ``output`` exists.
        ImageError: If an image cannot be read.
        ValueError: If there are fewer than two images, or ``holdout`` is below 2.
    """
    if holdout < 2:
        msg = f"holdout must be at least 2, got {holdout}: 5 keeps every fifth image out of the bank."
        raise ValueError(msg)
    if len(images) < 2:
        msg = f"An update needs at least two new normal images, got {len(images)}: one goes into the bank, one is held out."
        raise ValueError(msg)
    images = sorted(images, key=lambda image: (image.name, str(image)))
    held_out = images[holdout - 1 :: holdout] or images[-1:]
    added = [image for image in images if image not in held_out]
    old = PatchcoreRuntime.load(path)
    radius = old.manifest.covering_radius
    if radius is None:
        msg = (
            f"{path} does not record the covering radius of its memory bank, up to which it would be extended: an older "
            "version trained the model. Train again, with the new images among the normal ones; the export then records it."
        )
        raise BundleError(msg)
    with atomic_folder(output) as draft:
        patches, numbers = _uncovered(old, added, radius, progress)
        picks = farthest_first(*patches, radius, progress)
        vectors, numbers = patches[0][picks], numbers[picks]
        bank, index = _grown(old, vectors, held_out, progress)
        bank.save(draft / BANK)
        if old.origins is not None:
            _origins(old, numbers, added).write(draft)
        copy_files(path, old.manifest, draft)
        step = Update(parent=version_of(path), date=datetime.now(timezone.utc), images=len(added), vectors=len(vectors))
        image, pixel, calibration = recalibrated(old.manifest, _scores(old, bank, held_out, progress))
        manifest = old.manifest.model_copy(
            update={
                "format_version": FORMAT_VERSION,
                "created": step.date,
                "bank_size": len(bank),
                "index": index,
                "image": image,
                "pixel": pixel,
                "calibration": calibration,
                "lineage": [*old.manifest.lineage, step],
                "versions": old.manifest.versions | describe_versions("patchcore-plugin", "openvino", "faiss-cpu", "numpy"),
                "files": describe_files(draft),
            }
        )
        write_manifest(draft, manifest)
        self_test.record(draft)
    before, after = old.predict(held_out), PatchcoreRuntime.load(output).predict(held_out)
    return Report(step, len(bank), radius, [str(image) for image in held_out], before, after)


def recalibrated(manifest: Manifest, held_out: Scores) -> tuple[Scale, Scale, Calibration | None]:
    """Image and pixel scale of the new bundle, and its calibration.

    A calibration by normal images is extended by the held-out ones, and sets the thresholds again. A threshold that
    validation set with defective images cannot be set again without them: it stays.

    Args:
        manifest: The old bundle's.
        held_out: Scores of the held-out images with the new bank.
    """
    if manifest.calibration is None:
        return manifest.image, manifest.pixel, None
    maps = anomaly_map(held_out.patch, manifest.preprocessing.size)
    calibration = extend_calibration(
        manifest.calibration, held_out.image.tolist(), maps.max((1, 2)).tolist(), maps.mean((1, 2)).tolist()
    )
    return *set_thresholds(calibration), calibration


def _uncovered(
    runtime: PatchcoreRuntime, images: Sequence[Path], radius: float, progress: Progress
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], NDArray[np.int64]]:
    """Patches that lie farther than the radius from the bank: embeddings and distances; and their numbers in all images."""
    exact = MemoryBank(runtime.bank.vectors)
    points, distances, numbers = [], [], []
    for place, image in enumerate(images):
        progress("Embed", place, len(images))
        embedding = runtime.embed([read_image(image)])
        patches = embedding.reshape(-1, embedding.shape[-1])
        distance = exact.search(patches)[0][:, 0]
        far = np.flatnonzero(distance > radius)
        points.append(patches[far])
        distances.append(distance[far])
        numbers.append(far + place * len(patches))
    progress("Embed", len(images), len(images))
    return (np.concatenate(points), np.concatenate(distances)), np.concatenate(numbers)


def _grown(
    runtime: PatchcoreRuntime, vectors: NDArray[np.float32], held_out: Sequence[Path], progress: Progress
) -> tuple[MemoryBank, Index]:
    """The bank with more vectors, and what its index does on held-out images: the same kind, at least as wide, or exact."""
    progress("Index", 0, 1)
    measured = np.concatenate([runtime.embed([read_image(image)]) for image in held_out[:_MEASURED]])
    index = runtime.manifest.index
    # built anew: a graph mapped from a file cannot grow, nor can the range of int8
    bank, trials = choose(
        np.concatenate([runtime.bank.vectors, vectors]),
        measured,
        runtime.rule,
        index.kind,
        index.storage,
        threads=runtime.threads,
        least=index.width,
    )
    progress("Index", 1, 1)
    return bank, Index(kind=bank.index, storage=bank.storage, width=bank.width, trials=trials)


def _origins(runtime: PatchcoreRuntime, numbers: NDArray[np.int64], images: Sequence[Path]) -> Origins:
    old, grid = runtime.origins, runtime.manifest.grid
    if not len(numbers):
        return old
    new = locate_patches(numbers, [(str(image), *grid) for image in images])
    if old.thumbnails is not None:
        new = Origins(new.patches, new.images, make_thumbnails(new.images, runtime.manifest.preprocessing))
    return old.join(new)


def _scores(runtime: PatchcoreRuntime, bank: MemoryBank, images: Sequence[Path], progress: Progress) -> Scores:
    """Raw scores of images with the new bank."""
    found = []
    for place, image in enumerate(images, 1):
        found.append(bank.score(runtime.embed([read_image(image)]), runtime.rule))
        progress("Score", place, len(images))
    return Scores(*(np.concatenate(part) for part in zip(*found, strict=True)))
