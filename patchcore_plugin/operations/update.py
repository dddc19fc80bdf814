"""The operator's remedy for false alarms: extend a bundle by new normal images, without training and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_plugin.bundle import (
    DEFECTS_FORMAT,
    BundleError,
    Calibration,
    Index,
    Manifest,
    Member,
    Scale,
    Update,
    atomic_folder,
    check_outside,
    copy_files,
    describe_files,
    describe_versions,
    write_manifest,
)
from patchcore_plugin.bundle.origins import Origins, locate_patches, make_thumbnail
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError
from patchcore_plugin.memory_bank import Defects, EnsembleBank, MemoryBank, join_banks, save_banks, write_defects
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.memory_bank.defects import MAX_DEFECTS
from patchcore_plugin.memory_bank.growth import farthest_first
from patchcore_plugin.pasting import PASTED_IMAGES, paste
from patchcore_plugin.progress import no_progress
from patchcore_plugin.runtime import PatchcoreRuntime, Prediction, self_test
from patchcore_plugin.scoring import Scores, anomaly_map
from patchcore_plugin.scoring.conformal import check_new_session, extend_calibration, set_thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Sized

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind
    from patchcore_plugin.progress import Progress
    from patchcore_plugin.runtime.prediction import Outcome
    from patchcore_plugin.scoring.thresholds import Verdict

_MEASURED_IMAGES_LIMIT = 64


@dataclass(frozen=True)
class UpdateReport:
    """What an update did.

    Attributes:
        update: The step that the new bundle records.
        bank_size: Number of vectors of the new bank; of an ensemble, of all its banks.
        radii: Covering radius of each member's bank, which new patches lie within too, in feature units.
        indexes: The index of each member's bank, before and after.
        names: Paths of the held-out images; where none were held out, of the new ones.
        before: Predictions of these images by the old bundle.
        after: Predictions of these images by the new bundle.
    """

    update: Update
    bank_size: int
    radii: list[float]
    indexes: list[tuple[Index, Index]]
    names: list[str]
    before: list[Prediction]
    after: list[Prediction]

    def count(self, verdict: Verdict) -> tuple[int, int]:
        """Number of these images that got a verdict, before and after."""
        before, after = (sum(answer.verdict == verdict for answer in each) for each in (self.before, self.after))
        return before, after


def update_bundle(
    path: str | Path,
    images: Sequence[str | Path],
    output: str | Path,
    holdout: int | None = 5,
    progress: Progress = no_progress,
    defects: NDArray[np.float32] | None = None,
    index: IndexKind | None = None,
) -> UpdateReport:
    """Write a bundle's successor, whose memory bank knows new normal images too, and which may know defects.

    The bank is extended as it was built: farthest patch first, from the present vectors, until every patch of the new images
    lies within the covering radius that the bundle records. Some of the images stay out of the bank, to measure what the
    update does for images that it has not seen. Every image is decoded and embedded once.

    Args:
        path: Bundle to start from; it is not changed.
        images: New normal images.
        output: Folder of the new bundle.
        holdout: Sort the images by file name, and hold out every ``holdout``-th (the last one if there are fewer). None
            holds none out: the report then is of the new images themselves, and thresholds stay.
        progress: Called as the steps go on.
        defects: Embeddings of patches of defects (K, D), float32, that raise the scores of what resembles them; see
            :mod:`patchcore_plugin.memory_bank.defects`. Those of the bundle stay.
        index: Kind of index of the new bank, whatever it finds. None keeps the kind, or takes exact search where the kind
            does not find what exact search finds for these images.

    Raises:
        BundleError: If the bundle is damaged, or does not record its covering radius; or if ``output`` exists, or lies in
            the bundle.
        ImageError: If an image cannot be read.
        UsageError: If there are fewer than two images (without ``holdout`` none, and no defects), or ``holdout`` is below 2;
            if there are more than 2,000 vectors of defects; or if the thresholds were set by recording sessions, of which
            the held-out images are one more, and are too few.
    """
    check_number("holdout", holdout, 2, whole=True, optional=True, hint="5 keeps every fifth image out of the bank.")
    added, held_out = _divide(images, holdout)
    measured_images = held_out or added
    if not added and defects is None:
        msg = "There is nothing to update from: no new normal image, and no defect."
        raise UsageError(msg)
    _check_output(output, path)
    old = PatchcoreRuntime.load(path, mode="throughput")
    radii = _covering_radii(old) if added else []
    known = join_defects(old, defects)
    if old.manifest.calibration is not None and held_out:
        check_new_session(old.manifest.calibration, len(held_out))
    with atomic_folder(output) as draft:
        copy_files(path, old.manifest, draft)  # those of the bank are written anew below
        answers = _answers(old, measured_images, progress)
        measured, pasted = _measure(old, islice(answers, _MEASURED_IMAGES_LIMIT), PASTED_IMAGES if added else 0)
        members, bank, picks = old.manifest.all_members, old.bank, []
        if added:
            patches = _find_uncovered(old, added, radii, progress)
            picks = [
                farthest_first(part.embeddings, part.distances, radius, progress)
                for part, radius in zip(patches.members, radii, strict=True)
            ]
            embeddings = np.stack([embedding for embedding, _ in measured])
            members, bank = _grow_banks(old, patches, picks, (embeddings, np.concatenate(pasted)), index, progress)
            save_banks(bank, draft)
            if old.origins is not None:
                _grow_origins(old, patches, picks, added).write(draft)
        taught = None if known is None else Defects(known, members, bank.threads)
        if defects is not None:
            write_defects(known, draft)
        found, before = [], []
        later = ((outcome.embedding, outcome.prediction) for outcome in answers)
        for embedding, prediction in chain(measured, later):  # one image at a time, as serving scores them
            found.append(bank.score(embedding[None], old.rule, taught))
            before.append(prediction)
        image, pixel, calibration = old.manifest.image, old.manifest.pixel, old.manifest.calibration
        if held_out:
            image, pixel, calibration = recalibrate(
                old.manifest, Scores(*(np.concatenate(part) for part in zip(*found, strict=True)))
            )
        step = Update(
            parent=old.version,
            date=datetime.now(timezone.utc),
            images=len(added),
            vectors=sum(map(len, picks)),
            defects=None if defects is None else len(defects),
        )
        manifest = old.manifest.model_copy(
            update={
                "format_version": max(
                    3 if known is None else DEFECTS_FORMAT,
                    old.manifest.format_version,
                    *(member.index.format_version for member in members),
                ),
                "created": step.date,
                **Manifest.fields_of(members),
                "image": image,
                "pixel": pixel,
                "calibration": calibration,
                "lineage": [*old.manifest.lineage, step],
                "versions": old.manifest.versions | describe_versions("patchcore-plugin", "openvino", "faiss-cpu", "numpy"),
                "files": describe_files(draft),
            }
        )
        write_manifest(draft, manifest)
        progress("self-test", 0, 1)
        written = PatchcoreRuntime.load(draft, cache=False)  # which refuses files that do not fit together
        self_test.record(draft, written.manifest, written.self_test_scores())
    after = [Prediction.of(scores, 0, answer.size, manifest) for scores, answer in zip(found, before, strict=True)]
    indexes = [(was.index, now.index) for was, now in zip(old.manifest.all_members, members, strict=True)]
    return UpdateReport(step, len(bank), radii, indexes, [str(image) for image in measured_images], before, after)


def recalibrate(manifest: Manifest, held_out: Scores) -> tuple[Scale, Scale, Calibration | None]:
    """Extend the calibration by the held-out images, and set the thresholds again.

    Without a calibration by normal images both scales stay: a threshold that comes from a validation set with defective
    images cannot be set again without them.

    Args:
        manifest: Manifest of the old bundle.
        held_out: Scores of the held-out images with the new bank.

    Returns:
        Image scale, pixel scale and calibration of the new bundle.
    """
    if manifest.calibration is None:
        return manifest.image, manifest.pixel, None
    maxima, means, recipe = [], [], manifest.preprocessing
    for patch in held_out.patch:
        shown = anomaly_map(patch[None], recipe.size, region=recipe.region)
        maxima.append(float(shown.max()))
        means.append(float(shown.mean()))
    calibration = extend_calibration(manifest.calibration, held_out.image.tolist(), maxima, means)
    return *set_thresholds(calibration), calibration


def join_defects(runtime: PatchcoreRuntime, defects: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """The known defects of a bundle, and new ones, each once; None where there are neither.

    Raises:
        UsageError: If there are more than 2,000.
    """
    old = None if runtime.defects is None else runtime.defects.vectors
    both = [part for part in (old, defects) if part is not None]
    if not both:
        return None
    joined = np.unique(np.concatenate(both), axis=0)
    if len(joined) > MAX_DEFECTS:
        msg = f"A bundle knows {MAX_DEFECTS:,} patches of defects at most, and these would be {len(joined):,}."
        raise UsageError(msg)
    return joined


def _divide(images: Sequence[str | Path], holdout: int | None) -> tuple[list[Path], list[Path]]:
    """Images for the bank, and held-out ones."""
    if holdout is None:
        return list(map(Path, images)), []
    if len(images) < 2:
        msg = f"An update needs at least two new normal images, got {len(images)}: one goes into the bank, one is held out."
        raise UsageError(msg)
    images = sorted(map(Path, images), key=lambda image: (image.name, str(image)))
    held_out = images[holdout - 1 :: holdout] or images[-1:]
    return [image for image in images if image not in held_out], held_out


def _check_output(output: str | Path, bundle: str | Path) -> None:
    if Path(output).exists():
        msg = f"{output} exists already. An update writes a new bundle and replaces none: choose another folder."
        raise BundleError(msg)
    check_outside(output, bundle)


def _covering_radii(runtime: PatchcoreRuntime) -> list[float]:
    """Covering radius of each member's bank."""
    radii = [member.covering_radius for member in runtime.manifest.all_members]
    if None in radii:
        msg = (
            f"{runtime.path} does not record the covering radius of its memory bank, up to which it would be extended: an "
            "older version trained the model. Train again, with the new images among the normal ones; the export then "
            "records it."
        )
        raise BundleError(msg)
    return radii


class _MemberPatches(NamedTuple):
    """Patches of the added images that lie farther from a member's bank than its covering radius.

    Attributes:
        embeddings: Their embeddings (K, D), float32: the member's values.
        distances: Distance of each to the member's nearest bank vector (K,), float32.
        numbers: Number of each (K,), counted image by image and row by row.
    """

    embeddings: NDArray[np.float32]
    distances: NDArray[np.float32]
    numbers: NDArray[np.int64]


class _Patches(NamedTuple):
    """Patches of the added images that a bank does not cover.

    Attributes:
        members: Those of each member's bank.
        thumbnails: Thumbnail of each image that has such a patch, by its path; empty where the bundle has no thumbnails.
    """

    members: list[_MemberPatches]
    thumbnails: dict[str, NDArray[np.uint8]]


def _find_uncovered(
    runtime: PatchcoreRuntime, images: Sequence[Path], radii: Sequence[float], progress: Progress
) -> _Patches:
    exact = [MemoryBank(bank.vectors) for bank in runtime.bank.members]
    for bank in exact:
        bank.threads = runtime.threads
    small = runtime.origins is not None and runtime.origins.thumbnails is not None
    grid, region = runtime.manifest.grid, runtime.manifest.preprocessing.region
    inspected = np.arange(grid[0] * grid[1]) if region is None else region.patches(grid)
    found, thumbnails = [[] for _ in exact], {}
    for place, (image, outcome) in enumerate(zip(images, runtime.stream_embeddings(images), strict=True)):
        progress("embed new images", place, len(images))
        if outcome.error is not None:
            raise outcome.error
        covered = True
        for bank, own, radius, part, values in zip(
            runtime.bank.members, exact, radii, found, runtime.bank.split(outcome.embedding[None]), strict=True
        ):
            seen = runtime.rule.inspected(values)
            patches = seen.reshape(-1, own.dimension)
            # A search that misses the nearest vector finds a farther one: what it finds near enough is covered.
            far = np.flatnonzero(bank.nearest(seen)[0] > radius)
            distance = own.search(patches[far])[0][:, 0]
            far, distance = far[distance > radius], distance[distance > radius]
            part.append(_MemberPatches(patches[far], distance, inspected[far] + place * grid[0] * grid[1]))
            covered = covered and not len(far)
        if small and not covered:
            thumbnails[str(image)] = make_thumbnail(outcome.pixels, runtime.manifest.preprocessing)
    members = [_MemberPatches(*map(np.concatenate, zip(*part, strict=True))) for part in found]
    return _Patches(members, thumbnails)


def _answers(runtime: PatchcoreRuntime, images: Sequence[Path], progress: Progress) -> Iterator[Outcome]:
    """Outcome of each image, computed as they are asked for."""
    for done, outcome in enumerate(runtime.stream_outcomes(images), 1):
        if outcome.error is not None:
            raise outcome.error
        progress("score held-out images", done, len(images))
        yield outcome


def _measure(
    runtime: PatchcoreRuntime, answers: Iterable[Outcome], windows: int
) -> tuple[list[tuple[NDArray[np.float32], Prediction]], list[NDArray[np.float32]]]:
    """Embedding (h, w, D) and prediction of images, and embeddings (1, h, w, D) of the first ones with a pasted window."""
    measured, pasted, before = [], [], None
    for outcome in answers:
        measured.append((outcome.embedding, outcome.prediction))
        if len(pasted) < windows:
            source, inspected = outcome.pixels if before is None else before, runtime.manifest.preprocessing.inspected
            changed = paste(outcome.pixels, source, len(pasted), inspected)
            pasted.append(runtime.embed([changed]))
            before = outcome.pixels
    return measured, pasted


def _grow_banks(
    runtime: PatchcoreRuntime,
    patches: _Patches,
    picks: Sequence[NDArray[np.int64]],
    measured: tuple[NDArray[np.float32], NDArray[np.float32]],
    index: IndexKind | None,
    progress: Progress,
) -> tuple[list[Member], MemoryBank | EnsembleBank]:
    """The banks with more vectors, and what their indexes do on held-out images, and on some with a pasted window.

    A bank stays of its kind, at least as wide, or becomes exact.

    A bank is built anew: a graph that is mapped from a file cannot grow, nor can the range of int8.
    """
    members, banks, old = [], [], runtime.manifest.all_members
    for member, bank, part, picked, *own in zip(
        old, runtime.bank.members, patches.members, picks, *map(runtime.bank.split, measured), strict=True
    ):
        normal, pasted = own
        grown, trials = choose(
            np.concatenate([bank.vectors, part.embeddings[picked]]),
            normal,
            runtime.rule,
            index or member.index.kind,
            member.index.storage,
            progress,
            runtime.threads,
            least=0 if index else member.index.width,
            pasted=pasted,
        )
        banks.append(grown)
        about = Index(kind=grown.index, storage=grown.storage, width=grown.width, trials=trials)
        members.append(member.model_copy(update={"bank_size": len(grown), "index": about}))
    return members, join_banks(banks, runtime.bank.weights)


def _grow_origins(
    runtime: PatchcoreRuntime, patches: _Patches, picks: Sequence[NDArray[np.int64]], images: Sequence[Path]
) -> Origins:
    """Origins of the vectors of all banks: those of each bank, then those that it gained."""
    old, grids = runtime.origins, [(str(image), *runtime.manifest.grid) for image in images]
    gained = [locate_patches(part.numbers[picked], grids) for part, picked in zip(patches.members, picks, strict=True)]
    added = Origins.of_members(gained)
    shifted = added.patches + np.int32([len(old.images), 0, 0])
    both = zip(_cut(old.patches, runtime.bank.members), _cut(shifted, picks), strict=True)
    thumbnails = old.thumbnails
    if thumbnails is not None and added.images:
        thumbnails = np.concatenate([thumbnails, np.stack([patches.thumbnails[image] for image in added.images])])
    return Origins(np.concatenate(list(chain(*both))), [*old.images, *added.images], thumbnails)


def _cut(rows: NDArray[np.int32], parts: Sequence[Sized]) -> list[NDArray[np.int32]]:
    """Rows cut into pieces as long as the parts."""
    return np.split(rows, np.cumsum([len(part) for part in parts])[:-1])
