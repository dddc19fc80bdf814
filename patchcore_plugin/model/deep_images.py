"""Images deeper than 8 bits in training.

anomalib's data sets clip such images to 8 bits before the model gets them. A batch carries the paths of its images: the
model reads them again, as serving does.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from torchvision.transforms.v2 import Compose, Resize
from torchvision.transforms.v2.functional import to_dtype, to_image

from patchcore_plugin.cpu import cores
from patchcore_plugin.depth import IntensityRange, check_intensity_range
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import ImageError, check_depth, decode_image, read_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib.data import Batch
    from torchvision.transforms.v2 import Transform

logger = logging.getLogger(__name__)


def read_again(batch: Batch, intensity_range: IntensityRange | None, transform: Transform | None) -> None:
    """Replace the images of a batch by what an intensity range makes of their files.

    Without a range the images stay, and their files are checked: one that is deeper than 8 bits is refused.

    Args:
        batch: A batch as a data set gives it.
        intensity_range: The model's intensity range.
        transform: The transform of the model's pre-processor, whose resize makes images of different sizes alike.

    Raises:
        ImageError: If the depth of an image does not fit the range, or an image cannot be read.
        UsageError: If there is a range, and the batch has no paths.
    """
    paths = getattr(batch, "image_path", None)
    if intensity_range is None:
        for path in paths or ():
            check_depth(path, None)
        return
    if not paths:
        msg = "intensity_range reads images by their paths, and these have none: use a data set of anomalib."
        raise UsageError(msg)
    resizes = extract_transforms_by_type(transform, Resize)

    def read(path: str) -> torch.Tensor:
        image = read_scaled(path, intensity_range)
        return resizes[0](image) if resizes else image

    with ThreadPoolExecutor(cores()) as pool:
        batch.image = torch.stack(list(pool.map(read, paths)))


def read_scaled(path: str, intensity_range: IntensityRange) -> torch.Tensor:
    """Read an image file by an intensity range; returns (3, H, W), float32, in [0, 1], as anomalib's data sets do."""
    return to_dtype(to_image(read_image(path, intensity_range=intensity_range)), torch.float32, scale=True)


def check_dataset(dataset: Any) -> None:
    """Refuse a data set whose images the model cannot read by their paths.

    Raises:
        UsageError: If the data set augments its images, makes some itself, or is not one of anomalib.
    """
    if not isinstance(dataset, AnomalibDataset | PredictDataset):
        msg = f"intensity_range reads images by their paths; use a data set of anomalib instead of {type(dataset).__name__}."
        raise UsageError(msg)
    if isinstance(dataset, SyntheticAnomalyDataset):
        msg = (
            "The split mode 'synthetic' makes images of 8 bits, and intensity_range is for deeper ones: use another "
            "val_split_mode or test_split_mode, e.g. from_train."
        )
        raise UsageError(msg)
    transform = dataset.transform if isinstance(dataset, PredictDataset) else dataset.augmentations
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    others = [type(step).__name__ for step in steps if step is not None and not isinstance(step, Resize)]
    if others:
        msg = f"With intensity_range, augmentations of a data set have no effect: leave {', '.join(others)} out."
        raise UsageError(msg)


def find_intensity_range(loader: Any, group: torch.distributed.ProcessGroup | None) -> IntensityRange:
    """The smallest and the largest value of all normal training images, the same in every process of a group.

    Args:
        loader: Data loader of the training images.
        group: The processes of the training, which share the work; None for one process.

    Raises:
        ImageError: If an image has 8 bits, or holds NaN or infinite values, or cannot be read.
        UsageError: If the loader has no data set of anomalib, or all values are alike.
    """
    dataset = getattr(loader, "dataset", None)
    check_dataset(dataset)
    samples = dataset.samples
    paths = samples.image_path[samples.label_index == 0].tolist() or samples.image_path.tolist()
    rank, processes = (0, 1) if group is None else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    shares = [_all_ends(paths[rank::processes])]
    if group is not None:
        mine, shares = shares[0], [None] * processes
        torch.distributed.all_gather_object(shares, mine, group=group)
    for share in shares:
        if isinstance(share, ImageError):  # in every process, or the others would wait
            raise share
    ends = [pair for share in shares for pair in share]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high:
        msg = f"intensity_range 'auto' found no range: every value of the training images is {low:g}. Check the images."
        raise UsageError(msg)
    logger.info("intensity_range of %d training images: %s", len(paths), IntensityRange(low, high))
    return check_intensity_range((low, high))


def _all_ends(paths: Sequence[str]) -> list[tuple[float, float]] | ImageError:
    """Smallest and largest value of each image file, or the first error."""
    with ThreadPoolExecutor(cores()) as pool:
        try:
            return list(pool.map(_ends, paths))
        except ImageError as error:
            return error


def _ends(path: str) -> tuple[float, float]:
    """Smallest and largest value of an image file."""
    values = decode_image(path)
    if values.dtype == np.uint8:
        msg = f"{path} holds 8 bits (uint8), and intensity_range is for deeper images: leave it out."
        raise ImageError(msg)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        msg = f"{path} cannot be read as an image: it holds NaN or infinite values; give them a number first"
        raise ImageError(msg)
    return low, high
