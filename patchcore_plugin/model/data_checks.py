"""What can be wrong with a data module's files, found before the long work of a training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.image.folder import make_folder_dataset
from anomalib.data.errors import MisMatchError
from PIL import Image
from rich.progress import track

from patchcore_plugin.cpu import cores
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import ImageError
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer

_ANOMALOUS = 1
_FOLDERS = "normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir"  # of anomalib's Folder
_PROPORTION_TOLERANCE = 0.02
_FILES_WITHOUT_A_BAR = 1000
_WITHOUT_CHECKSUMS = ("JPEG", "TIFF", "BMP", "WEBP")


def set_up(trainer: Trainer) -> None:
    """Set a data module of anomalib up, as Lightning does next, and say what hinders it where anomalib does not.

    Raises:
        UsageError: If a path has letters outside ASCII, if a link leads to no file, or if masks are missing.
    """
    datamodule = getattr(trainer, "datamodule", None)  # absent where loaders were given instead
    if not isinstance(datamodule, AnomalibDataModule):
        return
    try:
        datamodule.setup(trainer.state.fn)
    except Exception as error:
        if reason := _explain(datamodule, error):
            raise UsageError(reason) from error
        # else Lightning meets the same error next, which is anomalib's own to tell


def _explain(datamodule: AnomalibDataModule, error: Exception) -> str | None:
    """What is wrong with the files of a data module; None where its own error says so."""
    if "non-printable" in str(error):
        path = str(error).rpartition("characters: ")[2]
        return f"anomalib takes paths in ASCII alone, and {path} has other letters: move or rename the folder."
    root = getattr(datamodule, "root", None)
    for name in _FOLDERS if isinstance(error, FileNotFoundError) else ():
        for folder in _listed(getattr(datamodule, name, None)):
            path = Path(root or ".", folder)
            if not path.is_dir():
                alone = (
                    " Where there are normal images alone, take configs/normal_only.yaml." if name == "abnormal_dir" else ""
                )
                return f"There is no folder {path}, which {name} names in the data section of the config.{alone}"
    if root and "missing file path" in str(error):
        for path in Path(root).rglob("*"):
            if path.is_symlink() and not path.exists():
                return f"{path} is a link to a file that is not there: repair it, or take it out of the data."
    pairing = any(frame.f_code is make_folder_dataset.__code__ for frame, _ in walk_tb(error.__traceback__))
    if pairing and getattr(datamodule, "mask_dir", None) and isinstance(error, IndexError | ValueError | MisMatchError):
        return (
            f"The masks in mask_dir ({datamodule.mask_dir}) do not fit the images in abnormal_dir "
            f"({getattr(datamodule, 'abnormal_dir', None)}): each anomalous image needs one mask of the same name. Add "
            f"the missing ones, or leave mask_dir out. anomalib says: {error}"
        )
    return None


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_data(trainer: Trainer, region_size: tuple[int, int] | None = None) -> None:
    """Refuse a data module of anomalib without validation set, or with files that a training would stop at.

    Of each image the checksums are read, or else the pixels, in several threads: 490 PNG files of 300 x 300 pixels take
    0.1 s.

    Args:
        trainer: The trainer of the data module.
        region_size: Width and height of the mask image of a region of interest, which must fit all images.

    Raises:
        UsageError: If there is no validation set, or a mask is missing or not of its image's size, or an image has other
            proportions than the region of interest; it names the file.
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
    subsets = (getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test"))
    tables = [subset.samples for subset in subsets if "image_path" in getattr(subset, "samples", ())]
    images = list(dict.fromkeys(image for samples in tables for image in samples["image_path"]))  # sets may share images
    with ThreadPoolExecutor(cores()) as pool:
        found = track(
            pool.map(_size, images), "Check images", len(images), transient=True, disable=len(images) < _FILES_WITHOUT_A_BAR
        )
        sizes = dict(zip(images, found, strict=True))
    check_proportions(sizes, region_size)
    for samples in tables:
        if samples.attrs.get("task") == "segmentation" and {"mask_path", "label_index"} <= set(samples):
            for image, mask, label in zip(samples["image_path"], samples["mask_path"], samples["label_index"], strict=True):
                if label == _ANOMALOUS and isinstance(mask, str):  # some data sets have several masks for an image
                    _check_mask(image, sizes[image], mask)


def check_proportions(sizes: Mapping[str | Path, tuple[int, int]], region_size: tuple[int, int] | None) -> None:
    """Refuse images with other proportions than the mask image of a region of interest.

    Args:
        sizes: Width and height of each image.
        region_size: Width and height of the mask image; None where there is none, so that any size fits.

    Raises:
        UsageError: If an image does not fit; it names the file.
    """
    for image, size in sizes.items() if region_size else ():
        if not have_same_proportions(size, region_size):
            msg = (
                f"The mask of region_of_interest has {region_size[0]} x {region_size[1]} pixels, {as_line(str(image))} "
                f"{size[0]} x {size[1]}: draw the mask on one of the images, which must have the same proportions."
            )
            raise UsageError(msg)


def have_same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two widths and heights have the same proportions, within 2 %."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= _PROPORTION_TOLERANCE


def _size(path: str) -> tuple[int, int]:
    """Width and height of an image file that seems whole."""
    try:
        with Image.open(path) as image:
            size = image.size
            if image.format in _WITHOUT_CHECKSUMS:
                image.draft(None, (1, 1))  # of a JPEG, the smallest picture that its data allow
                image.load()
            else:
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
