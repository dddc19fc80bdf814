"""What a trained model knows, as a bundle records it: pre-processing, thresholds, calibration, training images."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Identity, Normalize, Resize

from patchcore_plugin.bundle import BundleError, Preprocessing, Scale
from patchcore_plugin.bundle.origins import make_thumbnails
from patchcore_plugin.model.post_processing import ConformalPostProcessor
from patchcore_plugin.model.torch_model import read_tiles
from patchcore_plugin.scoring.conformal import set_thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Calibration
    from patchcore_plugin.bundle.origins import Origins
    from patchcore_plugin.model.lightning_model import FaissPatchcore

logger = logging.getLogger(__name__)


def read_preprocessing(model: FaissPatchcore) -> Preprocessing:
    """Read the steps of the model's pre-processor.

    Raises:
        BundleError: If the pre-processor has other steps than a bundle can hold.
    """
    transform = getattr(model.pre_processor, "transform", None)
    if transform is None:
        msg = "The model has no pre-processor, so a bundle would not know its image size and normalization."
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
        intensity_range=model.intensity_range,
        resize=tuple(resize.size),
        crop=tuple(crop[0].size) if crop else None,
        mean=tuple(normalization.mean),
        std=tuple(normalization.std),
        region=model.model.rule.region,
        tiles=model.model.tiler and read_tiles(model.model.tiler),
    )


def read_scales(model: FaissPatchcore) -> tuple[Scale, Scale]:
    """Read image and pixel scale of the model's post-processor. A part that it does not have is left out."""
    post = model.post_processor
    if post is not None and not isinstance(post, PostProcessor):
        logger.warning("A bundle cannot hold the post-processor %s: it will give raw scores only.", type(post).__name__)
    image, pixel = (_read_scale(post, level) if isinstance(post, PostProcessor) else Scale() for level in ("image", "pixel"))
    calibration = read_calibration(model)
    if calibration is not None and image.threshold is not None:
        image = image.model_copy(update={"review": set_thresholds(calibration)[0].review})
    if image.threshold is None:
        logger.warning("The model has no threshold (it was never validated): the bundle will give scores but no verdict.")
    return image, pixel


def _read_scale(post: PostProcessor, level: str) -> Scale:
    def number(name: str, *, enabled: bool) -> float | None:
        value = float(getattr(post, f"{level}_{name}"))
        return value if enabled and math.isfinite(value) else None

    return Scale(
        threshold=number("threshold", enabled=post.enable_thresholding),
        minimum=number("min", enabled=post.enable_normalization),
        maximum=number("max", enabled=post.enable_normalization),
        sensitivity=getattr(post, f"{level}_sensitivity"),
    )


def read_calibration(model: FaissPatchcore) -> Calibration | None:
    """Read the scores of normal images that the post-processor keeps; None where it keeps none."""
    post = model.post_processor
    return post.record() if isinstance(post, ConformalPostProcessor) else None


def read_origins(model: FaissPatchcore, recipe: Preprocessing, *, thumbnails: bool) -> Origins | None:
    """Read where the bank's vectors come from, as far as the model knows.

    Raises:
        BundleError: If thumbnails are asked for and a training image is unknown or not there any more.
        ImageError: If a training image cannot be read.
    """
    origins = model.origins
    if origins is not None and len(origins.patches) != sum(model.model.bank_sizes):
        origins = None  # of another bank: somebody replaced the model's
    if not thumbnails:
        return origins
    if origins is None:
        msg = "The model does not know its training images, so no thumbnails can be made of them. Train it again."
        raise BundleError(msg)
    return replace(origins, thumbnails=make_thumbnails(origins.images, recipe))


def read_held_out(model: FaissPatchcore, recipe: Preprocessing) -> list[NDArray[np.uint8]]:
    """Read the normal images of the validation set that the model keeps: RGB images (H, W, 3), u8.

    The model keeps them pre-processed. Here they get a border as wide as the crop takes off, so that the network sees them
    as they were.
    """
    if model.held_out is None:
        return []
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (recipe.mean, recipe.std))
    pixels = ((model.held_out.float() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    border = (*recipe.margins, (0, 0))
    return [np.ascontiguousarray(np.pad(image, border, mode="edge")) for image in pixels]
