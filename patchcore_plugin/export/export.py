"""From a trained FaissPatchcore to a bundle."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from patchcore_plugin.bundle import (
    ENSEMBLE_FORMAT,
    FEATURES,
    MAX_INPUT_SIDE,
    MAX_NAME_LENGTH,
    REGIONS_FORMAT,
    BundleError,
    Index,
    Manifest,
    Member,
    RegionRule,
    atomic_folder,
    describe_files,
    describe_versions,
    write_manifest,
)
from patchcore_plugin.checks import check_number
from patchcore_plugin.cpu import cores
from patchcore_plugin.export.model_records import (
    read_calibration,
    read_held_out,
    read_origins,
    read_preprocessing,
    read_scales,
)
from patchcore_plugin.export.network import write_network
from patchcore_plugin.export.precision import check_precision, choose_precision
from patchcore_plugin.images import read_image
from patchcore_plugin.memory_bank import EnsembleBank, MemoryBank, join_banks, save_banks
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.model.spade import COMPARISON_ONLY, SpadeModel
from patchcore_plugin.model.torch_model import MemoryBankError
from patchcore_plugin.pasting import paste_windows
from patchcore_plugin.progress import no_progress
from patchcore_plugin.runtime import PatchcoreRuntime, self_test

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind, IndexTrial, Precision, Preprocessing, Storage
    from patchcore_plugin.model.lightning_model import FaissPatchcore
    from patchcore_plugin.model.torch_model import FaissPatchcoreModel
    from patchcore_plugin.progress import Progress
    from patchcore_plugin.scoring import ScoreRule

logger = logging.getLogger(__name__)

_MEASURED_IMAGES_LIMIT = 64


def export_bundle(
    model: FaissPatchcore,
    path: str | Path,
    name: str | None = None,
    *,
    overwrite: bool = False,
    index: IndexKind | Literal["auto"] = "auto",
    storage: Storage = "float32",
    precision: Precision | Literal["auto"] = "f32",
    thumbnails: bool = False,
    images: Sequence[str | Path] | None = None,
    min_area: float = 0,
    mm_per_pixel: float | None = None,
    close_gaps: int = 0,
    progress: Progress = no_progress,
) -> Path:
    """Write a trained model as a bundle.

    Before the bundle takes its place it is loaded as serving would, and its embeddings are compared with the model's.

    Args:
        model: A fitted model, on any device, in any precision.
        path: Folder to write.
        name: Name of the model in the manifest; the folder's name if not given.
        overwrite: Replace a bundle that is already there.
        index: Index of the memory bank. ``"auto"`` measures which is fastest here among those that answer as exact search
            does; see :func:`patchcore_plugin.memory_bank.choice.choose`.
        storage: Number format of the bank's vectors; see :class:`patchcore_plugin.memory_bank.MemoryBank`.
        precision: Arithmetic of the network. ``"bf16"`` is used where the serving CPU has it. ``"int8"`` needs the extra
            ``quantize``. ``"auto"`` takes the fastest whose image scores keep a rank correlation of 0.99 and a mean
            error of 2 %.
        thumbnails: Put small pictures of the training images into the bundle, to show beside an anomaly. Each image that
            the bank has a patch of takes up to 192 KiB, in the bundle and in the memory of what serves it.
        images: Normal images that are not in the bank, to measure on; up to 64 of them are used. By default, images of the
            validation set that the checkpoint keeps.
        min_area: Least area of a region, in pixels of an image as it is sent, or in mm² with ``mm_per_pixel``. Smaller ones
            are counted, and not listed. Scores and verdicts do not depend on it.
        mm_per_pixel: Side of a pixel of an image as it is sent, in mm, so that regions are told in mm too.
        close_gaps: Parts with at most so many pixels of the image between them are one region.
        progress: Called as each step begins.

    Returns:
        The bundle's folder.

    Raises:
        MemoryBankError: If the model is not fitted.
        UsageError: If ``min_area``, ``mm_per_pixel`` or ``close_gaps`` is out of range.
        BundleError: If the folder exists; if the model has a part that a bundle cannot hold (a custom pre-processing step);
            if there are no images to measure a choice on; or if a training image is not there for its thumbnail.
        ImageError: If an image cannot be read.
    """
    path = Path(path)
    name = _checked_name(name or path.name)
    regions = _region_rule(min_area, mm_per_pixel, close_gaps)
    torch_model = model.model
    _check_exportable(torch_model)
    recipe = read_preprocessing(model)
    image, pixel = read_scales(model)
    origins = read_origins(model, recipe, thumbnails=thumbnails)
    measured = read_held_out(model, recipe) if images is None else _read_some(images, recipe)
    check_precision(precision, len(measured))
    with atomic_folder(path, overwrite=overwrite) as draft:
        progress("network", 0, 1)
        network = write_network(model, recipe, draft / FEATURES)
        *grid, _ = network.shape
        embedder = network.embedder()
        changed = paste_windows(measured, recipe.inspected)
        every = [*measured, *changed]
        embeddings = []
        for done, pixels in enumerate(every, start=1):
            embeddings.append(embedder.embed(pixels))
            progress("embed images", done, len(every))
        normal, pasted = (
            np.concatenate(part) if part else None for part in (embeddings[: len(measured)], embeddings[len(measured) :])
        )
        del network, embedder  # on Windows, a file in use is not replaced
        members, bank = _build_banks(model, normal, pasted, index, storage, progress)
        save_banks(bank, draft)
        if origins is not None:
            origins.write(draft)
        precision, precision_trials = choose_precision(
            draft / FEATURES, recipe, precision, bank, measured, torch_model.rule, progress
        )
        calibration = read_calibration(model)
        if calibration is not None and precision != "f32":
            logger.warning(
                "Thresholds and p-values were calibrated in float32, but this bundle's network works in %s, whose scores "
                "differ (see the table of the export): its false-alarm rate will not be exactly the one asked for.",
                precision,
            )
        manifest = Manifest(
            format_version=max(
                *(part.format_version for part in (recipe, calibration) if part is not None),
                *(member.index.format_version for member in members),
                ENSEMBLE_FORMAT if len(members) > 1 else 0,
                REGIONS_FORMAT if regions else 0,
            ),
            name=name,
            created=datetime.now(timezone.utc),
            **Manifest.fields_of(members),
            preprocessing=recipe,
            grid=tuple(grid),
            coreset_sampling_ratio=model.coreset_sampling_ratio,
            num_neighbors=torch_model.rule.num_neighbors,
            score_smoothing=torch_model.rule.score_smoothing,
            precision=precision,
            precision_trials=precision_trials,
            image=image,
            pixel=pixel,
            regions=regions,
            calibration=calibration,
            versions=describe_versions("patchcore-plugin", "anomalib", "torch", "timm", "openvino", "faiss-cpu", "numpy"),
            files=describe_files(draft),
        )
        write_manifest(draft, manifest)
        progress("self-test", 0, 1)
        written = PatchcoreRuntime.load(draft, cache=False)  # which refuses files that do not fit together
        self_test.record(draft, written.manifest, written.self_test_scores())
    return path


def _region_rule(min_area: float, mm_per_pixel: float | None, close_gaps: int) -> RegionRule | None:
    """The rule for regions; None where the values change nothing."""
    check_number("min_area", min_area, 0, 1e12, hint="It is in pixels of the image, or in mm² with mm_per_pixel.")
    check_number("mm_per_pixel", mm_per_pixel, 0, 1e6, closed="right", optional=True, hint="0.05 is 20 pixels for each mm.")
    check_number("close_gaps", close_gaps, 0, MAX_INPUT_SIDE, whole=True, hint="It is a number of pixels of the image.")
    rule = RegionRule(min_area=min_area, mm_per_pixel=mm_per_pixel, close_gaps=close_gaps)
    return None if rule == RegionRule() else rule


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        msg = f"The name of a model has 1 to {MAX_NAME_LENGTH} printable characters, got {name[:MAX_NAME_LENGTH]!r}."
        raise BundleError(f"{msg} Give another one (--name).")
    return name


def _check_exportable(model: FaissPatchcoreModel) -> None:
    if isinstance(model, SpadeModel):
        raise BundleError(COMPARISON_ONLY)
    if not model.is_fitted:
        msg = "The memory bank is empty: train the model before exporting it."
        raise MemoryBankError(msg)
    if model.tiler is not None and model.position_weight:
        msg = "A model of version 0.1 with a position_weight cannot be exported with tiles: train again."
        raise BundleError(msg)


def _read_some(images: Sequence[str | Path], recipe: Preprocessing) -> list[NDArray[np.uint8]]:
    """Images (H, W, 3), u8, RGB, at even steps, so many as are used to measure on."""
    some = images[:: -(-len(images) // _MEASURED_IMAGES_LIMIT)]
    return [read_image(image, intensity_range=recipe.intensity_range) for image in some]


def _build_banks(
    model: FaissPatchcore,
    normal: NDArray[np.float32] | None,
    pasted: NDArray[np.float32] | None,
    index: IndexKind | Literal["auto"],
    storage: Storage,
    progress: Progress,
) -> tuple[list[Member], MemoryBank | EnsembleBank]:
    """The memory bank, of an ensemble that of each member, and their records.

    Args:
        model: The model.
        normal: Patch embeddings (B, h, w, D) of images to measure on; None without images.
        pasted: Those (C, h, w, D) of images with a pasted window; None without images.
        index: The index asked for, or the choice of the fastest.
        storage: Number format of the vectors.
        progress: Called as each step begins.
    """
    if normal is None and index == "auto":
        logger.warning("No held-out normal images to choose an index by: the bank is flat. Give some (--images).")
    ends = np.cumsum(model.model.widths)[:-1]
    parts = zip(
        *(
            [None] * len(model.model.members) if values is None else np.split(values, ends, axis=-1)
            for values in (normal, pasted)
        ),
        strict=True,
    )
    names = [model.hparams.get("backbone"), *(member["backbone"] for member in model.ensemble or [])]
    members, banks = [], []
    for member, name, weight, part in zip(model.model.members, names, model.model.weights, parts, strict=True):
        bank, trials = _build_bank(member, model.model.rule, *part, index, storage, progress)
        banks.append(bank)
        members.append(
            Member(
                backbone=str(name),
                layers=list(member.layers),
                embedding_dimension=bank.dimension,
                bank_size=len(bank),
                covering_radius=None if member.covering_radius.isnan() else float(member.covering_radius),
                index=Index(kind=bank.index, storage=bank.storage, width=bank.width, trials=trials),
                weight=float(weight),
            )
        )
    return members, join_banks(banks, [member.weight for member in members])


def _build_bank(
    model: FaissPatchcoreModel,
    rule: ScoreRule,
    normal: NDArray[np.float32] | None,
    pasted: NDArray[np.float32] | None,
    index: IndexKind | Literal["auto"],
    storage: Storage,
    progress: Progress,
) -> tuple[MemoryBank, list[IndexTrial]]:
    """The memory bank with the index asked for, or the fastest; and what was measured on the embeddings."""
    vectors = model.memory_bank.detach().float().cpu().numpy()
    if normal is not None:
        only, normal, pasted = None if index == "auto" else index, *map(np.ascontiguousarray, (normal, pasted))
        return choose(vectors, normal, rule, only, storage, progress, cores(), pasted=pasted)
    bank = MemoryBank(vectors, "flat" if index == "auto" else index, storage)
    bank.find_neighbors(rule.num_neighbors)
    return bank, []
