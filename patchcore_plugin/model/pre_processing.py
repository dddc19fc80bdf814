"""The default pre-processor: size and normalization of images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.backbone import known_statistics, pretrained_statistics
from patchcore_plugin.model.torch_model import Renormalization
from patchcore_plugin.model.weights import PACKAGED

if TYPE_CHECKING:
    from torch import nn

Normalization = Literal["imagenet", "backbone"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

logger = logging.getLogger(__name__)


def build_pre_processor(
    image_size: tuple[int, int] | None = None,
    center_crop_size: tuple[int, int] | None = None,
    normalization: Normalization = "imagenet",
    backbone: str = "",
) -> PreProcessor:
    """Build a pre-processor that resizes images, crops their center and normalizes them.

    Args:
        image_size: Height and width after resizing, in pixels. ``None`` is 256 x 256.
        center_crop_size: Height and width of the crop, in pixels. ``None`` crops nothing.
        normalization: ``"imagenet"`` takes ImageNet's mean and standard deviation, ``"backbone"`` those that the weights of
            ``backbone`` were trained with.
        backbone: timm model name; used by ``"backbone"`` alone.

    Raises:
        UsageError: If the crop is larger than the resized image, or timm does not know the backbone's normalization.
    """
    image_size = image_size or (256, 256)
    steps: list[nn.Module] = [Resize(image_size, antialias=True)]
    if center_crop_size is not None:
        if center_crop_size[0] > image_size[0] or center_crop_size[1] > image_size[1]:
            msg = f"center_crop_size {center_crop_size} does not fit into image_size {image_size}."
            raise UsageError(msg)
        steps.append(CenterCrop(center_crop_size))
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalization == "imagenet" else pretrained_statistics(backbone)
    steps.append(Normalize(mean=mean, std=std))
    return PreProcessor(transform=Compose(steps))


def renormalization(backbone: str, member: str, normalization: Normalization) -> Renormalization | None:
    """What a further member of an ensemble does to images that are normalized for the first backbone.

    Args:
        backbone: Name of the first backbone.
        member: Name of the member's.
        normalization: As of :func:`build_pre_processor`; ``"imagenet"`` is the same for all.

    Raises:
        UsageError: If timm does not know a backbone's normalization.
    """
    if normalization == "imagenet":
        return None
    return Renormalization.between(pretrained_statistics(backbone), pretrained_statistics(member))


def normalization_of(backbone: str) -> Normalization:
    """The normalization for a backbone for which none is given.

    The names of the packaged weights, which no config of anomalib has, get the statistics of those weights. A model of timm
    gets ImageNet's, as anomalib normalizes for every backbone; where its weights were trained otherwise, the log says so.

    Args:
        backbone: Name of the backbone.
    """
    if backbone in PACKAGED:
        return "backbone"
    known = known_statistics(backbone)
    if known not in (None, (IMAGENET_MEAN, IMAGENET_STD)):
        logger.warning(
            "The weights of %s were trained with mean %s and standard deviation %s. Images are normalized with "
            "ImageNet's, as anomalib does; `normalization: backbone` takes those of the weights.",
            backbone, *known,
        )  # fmt: skip
    return "imagenet"
