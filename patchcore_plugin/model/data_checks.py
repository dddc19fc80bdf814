"""What can be wrong with a data module's files, found before the long work of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.data import AnomalibDataModule
from PIL import Image

from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import ImageError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_ANOMALOUS = 1


def check_data(trainer: Trainer) -> None:
    """Refuse a data module of anomalib without validation set, or with files that a training would stop at.

    Of each image the header is read, and what else tells without decoding whether the file is whole: the checksums of a
    PNG, but not the pixels of a JPEG.

    Raises:
        UsageError: If there is no validation set, or a mask is missing or not of its image's size; it names the file.
        ImageError: If a file is no image, or a damaged one; it names the file.
    """
    datamodule = getattr(trainer, "datamodule", None)  # absent where loaders were given instead
    if not isinstance(datamodule, AnomalibDataModule):
        return
    if not hasattr(datamodule, "val_data") and trainer.limit_val_batches:
        msg = (
            "The data module has no validation set, which sets the thresholds: set val_split_mode to from_test, "
            "same_as_test or from_train; or set the trainer's limit_val_batches to 0, for a model without thresholds."
        )
        raise UsageError(msg)
    sizes: dict[str, tuple[int, int]] = {}  # a validation set may be the test set
    for name in ("train", "val", "test"):
        samples = getattr(getattr(datamodule, f"{name}_data", None), "samples", None)
        if samples is None or "image_path" not in samples:
            continue
        for image in samples["image_path"]:
            if image not in sizes:
                sizes[image] = _size(image)
        if samples.attrs.get("task") == "segmentation" and {"mask_path", "label_index"} <= set(samples):
            for image, mask, label in zip(samples["image_path"], samples["mask_path"], samples["label_index"], strict=True):
                if label == _ANOMALOUS and isinstance(mask, str):  # some data sets have several masks for an image
                    _check_mask(image, sizes[image], mask)


def _size(path: str) -> tuple[int, int]:
    """Width and height of an image file that seems whole."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.verify()
    except Exception as error:  # decoders raise nearly any exception on damaged bytes
        msg = f"{path} cannot be read as an image: {error or type(error).__name__}. Repair it, or take it out of the data."
        raise ImageError(msg, str(error)) from error
    return size


def _check_mask(image: str, size: tuple[int, int], mask: str) -> None:
    if not mask or not Path(mask).is_file():
        msg = f"{image} is anomalous and has no mask: put one into mask_dir under the image's name, or leave mask_dir out."
        raise UsageError(msg)
    found = _size(mask)
    if found != size:
        msg = (
            f"{mask} has {found[0]} x {found[1]} pixels, its image {image} {size[0]} x {size[1]}: a mask must have the size "
            "of its image."
        )
        raise UsageError(msg)
