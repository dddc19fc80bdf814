"""From a trained FaissPatchcore to a bundle."""

from __future__ import annotations

import copy
import logging
import math
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import torch
from anomalib.post_processing import PostProcessor
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Identity, Normalize, Resize

from patchcore_plugin.bundle import (
    BANK,
    FEATURES,
    MANIFEST,
    BundleError,
    Manifest,
    Preprocessing,
    Scale,
    atomic_folder,
    describe_files,
)
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.model.torch_model import MemoryBankError
from patchcore_plugin.runtime import PatchcoreRuntime

if TYPE_CHECKING:
    from patchcore_plugin.model.lightning_model import FaissPatchcore
    from patchcore_plugin.model.torch_model import FaissPatchcoreModel

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of the embedding's largest value: what the IR may differ from torch by


def export_bundle(model: FaissPatchcore, path: str | Path, name: str | None = None, *, overwrite: bool = False) -> Path:
    """Write a trained model as a bundle.

    Before the bundle takes its place it is loaded as serving would, and its embeddings are compared with the model's.

    Args:
        model: A fitted model, on any device, in any precision; the bundle is float32.
        path: Folder to write.
        name: Name of the model in the manifest; the folder's name if not given.
        overwrite: Replace a bundle that is already there.

    Returns:
        The bundle's folder.

    Raises:
        MemoryBankError: If the model is not fitted.
        BundleError: If the folder exists, or the model has a part that a bundle cannot hold: a custom pre-processing step,
            tiling.
    """
    path = Path(path)
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
    network = _Embedding(torch_model)
    with atomic_folder(path, overwrite=overwrite) as draft:
        grid, dimension = _write_ir(network, recipe, draft / FEATURES)
        bank = MemoryBank(torch_model.memory_bank.detach().float().cpu().numpy())
        bank.save(draft / BANK)
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
            num_neighbors=torch_model.num_neighbors,
            image=image,
            pixel=pixel,
            versions={
                "python": platform.python_version(),
                **{
                    package: version(package)
                    for package in ("patchcore-plugin", "anomalib", "torch", "timm", "openvino", "faiss-cpu", "numpy")
                },
            },
            files=describe_files(draft),
        )
        (draft / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _compare(PatchcoreRuntime.load(draft), network, recipe, model)
    return path


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
    """Image and pixel scale of anomalib's post-processor."""
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


def _write_ir(network: _Embedding, recipe: Preprocessing, path: Path) -> tuple[tuple[int, int], int]:
    """Write the IR of pre-processing and embedding; returns the patch grid and the embedding's dimension."""
    height, width = recipe.size
    example = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        _, rows, columns, dimension = network(example).shape
    ir = ov.convert_model(network, example_input=example, input=[-1, 3, height, width])
    steps = PrePostProcessor(ir)
    # RGB, f32 in [0, 255], NHWC, any height and width: the IR is complete in itself. The runtime hands it images that
    # Pillow has resized in the same way: OpenVINO's resize is right but slow, and holds the whole image as floats.
    steps.input().tensor().set_element_type(ov.Type.f32).set_layout(ov.Layout("NHWC")).set_spatial_dynamic_shape()
    steps.input().model().set_layout(ov.Layout("NCHW"))
    # Pillow's bilinear filter is the antialiased one of training; on floats it does not round in between.
    process = steps.input().preprocess()
    process.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW, *recipe.resize)
    if recipe.crop:
        top, left = recipe.offset
        everything = 2**31 - 1
        process.crop([0, top, left, 0], [everything, top + height, left + width, 3])
    process.mean([255 * value for value in recipe.mean]).scale([255 * value for value in recipe.std])
    ov.save_model(steps.build(), path, compress_to_fp16=False)
    return (rows, columns), dimension


def _compare(runtime: PatchcoreRuntime, network: _Embedding, recipe: Preprocessing, model: FaissPatchcore) -> None:
    """Refuse a bundle whose embeddings are not the model's."""
    shape = (2, recipe.resize[0] + 37, recipe.resize[1] + 11, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        transformed = model.pre_processor.transform(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        expected = network(transformed.cpu()).numpy()
    error = float(np.abs(runtime.embed(list(images)) - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        msg = f"The exported network differs from the model by {error:.2g} of its largest feature; nothing was written."
        raise BundleError(msg)
