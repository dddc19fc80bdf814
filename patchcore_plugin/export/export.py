"""From a trained FaissPatchcore to a bundle."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from anomalib.post_processing import PostProcessor
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Identity, Normalize, Resize

from patchcore_plugin.bundle import (
    BANK,
    FEATURES,
    BundleError,
    Index,
    Manifest,
    Preprocessing,
    Scale,
    atomic_folder,
    describe_files,
    describe_versions,
    write_manifest,
)
from patchcore_plugin.bundle.origins import make_thumbnails
from patchcore_plugin.cpu import cores
from patchcore_plugin.export.precision import choose_precision
from patchcore_plugin.images import read_image
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.model.post_processing import ConformalPostProcessor
from patchcore_plugin.model.torch_model import MemoryBankError
from patchcore_plugin.runtime import self_test
from patchcore_plugin.runtime.network import INPUT, NORMALIZED, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Calibration, IndexKind, Precision, Storage
    from patchcore_plugin.bundle.origins import Origins
    from patchcore_plugin.model.lightning_model import FaissPatchcore
    from patchcore_plugin.model.torch_model import FaissPatchcoreModel
    from patchcore_plugin.runtime.network import Embedder

logger = logging.getLogger(__name__)

_HELD_OUT = 64  # images to measure on, at most
_TOLERANCE = 1e-3  # of the embedding's largest value: what the IR may differ from torch by


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
    progress: Callable[[str], object] | None = None,
) -> Path:
    """Write a trained model as a bundle.

    Before the bundle takes its place it is loaded as serving would, and its embeddings are compared with the model's.

    Args:
        model: A fitted model, on any device, in any precision.
        path: Folder to write.
        name: Name of the model in the manifest; the folder's name if not given.
        overwrite: Replace a bundle that is already there.
        index: Index of the memory bank. ``"auto"`` measures which is fastest here, at a recall@1 of 0.999 at least; see
            :func:`patchcore_plugin.memory_bank.choice.choose`.
        storage: Precision of the bank's vectors; see :class:`patchcore_plugin.memory_bank.MemoryBank`.
        precision: Arithmetic of the network. ``"bf16"`` is used where the serving CPU has it. ``"int8"`` needs the extra
            ``quantize``. ``"auto"`` takes the fastest whose image scores keep a rank correlation of 0.99 and a mean
            error of 2 %.
        thumbnails: Put small pictures of the training images into the bundle, to show beside an anomaly: 192 KiB for each
            image that the bank has a patch of, in the bundle and in the memory of what serves it.
        images: Normal images that are not in the bank, to measure on: up to 64 of them. By default those of the
            validation set that the checkpoint keeps.
        progress: Called with what is done next.

    Returns:
        The bundle's folder.

    Raises:
        MemoryBankError: If the model is not fitted.
        BundleError: If the folder exists, or the model has a part that a bundle cannot hold: a custom pre-processing step,
            tiling; or if there are no images to measure a choice on, or a training image is not there for its thumbnail.
        ImageError: If an image cannot be read.
    """
    path = Path(path)
    progress = progress or (lambda _: None)
    torch_model = model.model
    if not torch_model.memory_bank.numel():
        msg = "The memory bank is empty: train the model before exporting it."
        raise MemoryBankError(msg)
    if torch_model.tiler is not None:
        msg = "A bundle cannot hold a tiled model yet. Turn tiling off, or use anomalib's own export (`anomalib export`)."
        raise BundleError(msg)
    recipe = _preprocessing(model)
    image, pixel = _scales(model)
    if image.threshold is None:
        logger.warning("The model has no threshold (it was never validated): the bundle will give scores but no verdict.")
    origins = _origins(model, recipe, thumbnails=thumbnails)
    held_out = _held_out(model, recipe, images)
    network = _Embedding(torch_model)
    vectors = torch_model.memory_bank.detach().float().cpu().numpy()
    with atomic_folder(path, overwrite=overwrite) as draft:
        progress("network")
        grid, dimension = _write_ir(network, recipe, draft / FEATURES)
        embedder = Network(draft / FEATURES).embedder()
        _compare(embedder, network, recipe, model)
        embeddings = np.concatenate([embedder.embed(image) for image in held_out]) if held_out else None
        del embedder  # on Windows, a file in use is not replaced
        if embeddings is not None:
            only = None if index == "auto" else index
            bank, trials = choose(vectors, embeddings, torch_model.rule, only, storage, progress, cores())
        else:
            if index == "auto":
                logger.warning("No held-out normal images to choose an index by: the bank is flat. Give some (--images).")
            bank, trials = MemoryBank(vectors, "flat" if index == "auto" else index, storage), []
            bank.find_neighbors(torch_model.num_neighbors)
        bank.save(draft / BANK)
        if origins is not None:
            origins.write(draft)
        precision, precision_trials = choose_precision(
            draft / FEATURES, precision, bank, held_out, torch_model.rule, progress
        )
        manifest = Manifest(
            name=name or path.name,
            created=datetime.now(timezone.utc),
            backbone=str(model.hparams.get("backbone")),
            layers=list(torch_model.layers),
            preprocessing=recipe,
            grid=grid,
            embedding_dimension=dimension,
            bank_size=len(bank),
            coreset_sampling_ratio=model.coreset_sampling_ratio,
            covering_radius=None if torch_model.covering_radius.isnan() else float(torch_model.covering_radius),
            **asdict(torch_model.rule),
            index=Index(kind=bank.index, storage=bank.storage, width=bank.width, trials=trials),
            precision=precision,
            precision_trials=precision_trials,
            image=image,
            pixel=pixel,
            calibration=_calibration(model, precision),
            versions=describe_versions("patchcore-plugin", "anomalib", "torch", "timm", "openvino", "faiss-cpu", "numpy"),
            files=describe_files(draft),
        )
        write_manifest(draft, manifest)
        progress("self-test")
        self_test.record(draft)
    return path


def _origins(model: FaissPatchcore, recipe: Preprocessing, *, thumbnails: bool) -> Origins | None:
    """Where the bank's vectors come from, as far as the model knows."""
    origins = model.origins
    if origins is not None and len(origins.patches) != len(model.model.memory_bank):
        origins = None  # of another bank: this one was put there by hand
    if not thumbnails:
        return origins
    if origins is None:
        msg = "The model does not know its training images, so there is nothing to make thumbnails of. Train it again."
        raise BundleError(msg)
    return replace(origins, thumbnails=make_thumbnails(origins.images, recipe))


def _held_out(model: FaissPatchcore, recipe: Preprocessing, images: Sequence[str | Path] | None) -> list[NDArray[np.uint8]]:
    """Normal images (H, W, 3), u8, RGB, that are not in the bank."""
    if images is not None:
        paths = list(images)
        return [read_image(path) for path in paths[:: -(-len(paths) // _HELD_OUT)]]
    if model.held_out is None:
        return []
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (recipe.mean, recipe.std))
    pixels = ((model.held_out.float() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    # They were cropped already: with a border as wide as the crop takes, the network sees them as they are.
    border = (*recipe.margins, (0, 0))
    return [np.ascontiguousarray(np.pad(image, border, mode="edge")) for image in pixels]


class _Embedding(nn.Module):
    """Pre-processed images (B, 3, H, W) to embeddings (B, h, w, D), float32, on the CPU."""

    def __init__(self, model: FaissPatchcoreModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.embed(images)


def _preprocessing(model: FaissPatchcore) -> Preprocessing:
    """Read the pre-processor's steps."""
    transform = getattr(model.pre_processor, "transform", None)
    if transform is None:
        msg = "The model has no pre-processor, so a bundle would not know its image size and normalisation."
        raise BundleError(msg)
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    steps = [step for step in steps if not isinstance(step, Identity)]
    kinds = [type(step) for step in steps]
    if kinds not in ([Resize, Normalize], [Resize, CenterCrop, Normalize]):
        names = ", ".join(kind.__name__ for kind in kinds) or "nothing"
        msg = f"A bundle holds Resize, an optional CenterCrop, and Normalize, in this order; the pre-processor has {names}."
        raise BundleError(msg)
    resize, *crop, normalization = steps
    if not isinstance(resize.size, list | tuple) or len(resize.size) != 2:
        msg = f"A bundle needs Resize with a height and a width, e.g. (256, 256); the pre-processor has {resize.size}."
        raise BundleError(msg)
    if InterpolationMode(resize.interpolation) != InterpolationMode.BILINEAR or not resize.antialias:
        msg = f"A bundle holds a bilinear Resize with antialias=True; the pre-processor has {resize}."
        raise BundleError(msg)
    return Preprocessing(
        resize=tuple(resize.size),
        crop=tuple(crop[0].size) if crop else None,
        mean=tuple(normalization.mean),
        std=tuple(normalization.std),
    )


def _scales(model: FaissPatchcore) -> tuple[Scale, Scale]:
    """Image and pixel scale of the post-processor."""
    post = model.post_processor
    if post is None:
        return Scale(), Scale()
    if not isinstance(post, PostProcessor):
        logger.warning("A bundle cannot hold the post-processor %s: it will give raw scores only.", type(post).__name__)
        return Scale(), Scale()

    def number(value: torch.Tensor, *, enabled: bool) -> float | None:
        return float(value) if enabled and math.isfinite(float(value)) else None

    return (
        Scale(
            threshold=number(post.image_threshold, enabled=post.enable_thresholding),
            minimum=number(post.image_min, enabled=post.enable_normalization),
            maximum=number(post.image_max, enabled=post.enable_normalization),
            sensitivity=post.image_sensitivity,
        ),
        Scale(
            threshold=number(post.pixel_threshold, enabled=post.enable_thresholding),
            minimum=number(post.pixel_min, enabled=post.enable_normalization),
            maximum=number(post.pixel_max, enabled=post.enable_normalization),
            sensitivity=post.pixel_sensitivity,
        ),
    )


def _calibration(model: FaissPatchcore, precision: Precision) -> Calibration | None:
    """What the post-processor keeps of normal images, if it is one that does."""
    post = model.post_processor
    record = post.record() if isinstance(post, ConformalPostProcessor) else None
    if record is not None and precision != "f32":
        logger.warning(
            "Thresholds and p-values were calibrated in float32, but this bundle's network works in %s, whose scores differ "
            "(see the table of the export): its false-alarm rate will not be exactly the one asked for.",
            precision,
        )
    return record


def _write_ir(network: _Embedding, recipe: Preprocessing, path: Path) -> tuple[tuple[int, int], int]:
    """Write the IR of pre-processing and embedding; returns the patch grid and the embedding's dimension."""
    height, width = recipe.size
    example = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        _, rows, columns, dimension = network(example).shape
    ir = with_preprocessing(ov.convert_model(network, example_input=example, input=[-1, 3, height, width]), recipe)
    ov.save_model(ir, path, compress_to_fp16=False)
    return (rows, columns), dimension


def with_preprocessing(network: ov.Model, recipe: Preprocessing) -> ov.Model:
    """Put the steps from an image to the backbone's input before a network.

    Args:
        network: Model with one input, (B, 3, h, w) float32, normalised.
        recipe: The steps.

    Returns:
        Model with the input ``images`` (B, H, W, 3), u8, RGB, of any size. The resize is training's, bilinear and
        antialiased, as matrix products whose triangles are cut to the image in the graph: equal to it within rounding, and
        many times faster than OpenVINO's own antialiased resize, which works value by value.
    """
    images = ops.parameter([-1, -1, -1, 3], np.uint8, name=INPUT)
    images.output(0).get_tensor().set_names({INPUT})
    (top, left), (height, width) = recipe.offset, recipe.size
    # (B, H, W, 3) -> (B, h, W, 3) -> (B, W, 3, h) -> (B, w, 3, h) -> (B, 3, h, w)
    down = _resized(ops.reshape(images, np.int64([0, 0, -1]), True), recipe.resize[0], top, height)
    turned = ops.transpose(ops.reshape(down, np.int64([0, 0, -1, 3]), True), np.int64([0, 2, 3, 1]))
    across = _resized(ops.reshape(turned, np.int64([0, 0, -1]), True), recipe.resize[1], left, width)
    resized = ops.transpose(ops.reshape(across, np.int64([0, 0, 3, -1]), True), np.int64([0, 2, 3, 1]))
    mean = np.float32(recipe.mean).reshape(1, 3, 1, 1)
    std = np.float32(recipe.std).reshape(1, 3, 1, 1)
    normalised = ops.multiply(ops.subtract(resized, 255 * mean), 1 / (255 * std), name=NORMALIZED)
    network.inputs[0].replace(normalised.output(0))
    return ov.Model(network.outputs, [images], "features")


_BAND = 16  # rows of the result that one matrix product computes, from those rows of the image that they depend on


def _resized(values: ov.Node, size: int, first: int, count: int) -> ov.Node:
    """Resize the second axis of (B, P, F) to ``size``, bilinear and antialiased, of which ``count`` from ``first`` are kept.

    A value of the result at position i is a mean of those at positions p, weighted by a triangle about i. Positions are
    whole numbers, in units in which a pixel of the image measures 2 * size and one of the result 2 * P: floats would lose
    their digits where a network is computed in bfloat16.
    """
    batch, pixels, _ = ops.split(ops.shape_of(values, "i32"), np.int64(0), 3).outputs()
    bands = -(-count // _BAND)
    kept = np.minimum(np.arange(first, first + bands * _BAND), first + count - 1).reshape(bands, _BAND, 1)
    centres = ops.multiply((2 * kept + 1).astype(np.int32), pixels)
    reach = ops.multiply(ops.maximum(pixels, np.int32(size)), np.int32(2))
    # Each band takes as many rows of the image, from the first on that its first triangle touches.
    unit = np.int32(2 * size)
    spread = ops.add(ops.multiply(pixels, np.int32(2 * (_BAND - 1))), ops.multiply(reach, np.int32(2)))
    taken = ops.minimum(ops.add(ops.divide(spread, unit), np.int32(2)), pixels)
    lowest = ops.subtract(ops.multiply((2 * kept[:, 0] + 1).astype(np.int32), pixels), ops.add(reach, np.int32(size)))
    start = ops.minimum(ops.divide(ops.maximum(lowest, np.int32(0)), unit), ops.subtract(pixels, taken))
    rows = ops.add(start, ops.range(np.int32(0), ops.squeeze(taken, np.int64([0])), np.int32(1), "i32"))
    positions = ops.unsqueeze(ops.add(ops.multiply(rows, unit), np.int32(size)), np.int64(1))
    weights = ops.convert(ops.maximum(ops.subtract(reach, ops.abs(ops.subtract(positions, centres))), np.int32(0)), "f32")
    weights = ops.divide(weights, ops.reduce_sum(weights, np.int64([2]), True))
    bands_of_values = ops.convert(ops.gather(values, rows, np.int64(1)), "f32")  # (B, bands, taken, F)
    banded = ops.matmul(weights, bands_of_values, False, False)
    shape = ops.concat([batch, np.int32([bands * _BAND, -1])], 0)
    together = ops.reshape(banded, shape, False)
    if bands * _BAND == count:
        return together
    return ops.slice(together, np.int64([0]), np.int64([count]), np.int64([1]), np.int64([1]))


def _compare(embedder: Embedder, network: _Embedding, recipe: Preprocessing, model: FaissPatchcore) -> None:
    """Refuse an IR whose embeddings are not the model's."""
    shape = (2, recipe.resize[0] + 37, recipe.resize[1] + 11, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        transformed = model.pre_processor.transform(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        expected = network(transformed.cpu()).numpy()
    found = np.concatenate([embedder.embed(image) for image in images])
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        msg = f"The exported network differs from the model by {error:.2g} of its largest feature; nothing was written."
        raise BundleError(msg)
