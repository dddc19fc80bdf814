"""Origins: the training image, and the row and column of the patch, that each vector of a memory bank comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from patchcore_plugin.bundle.content import FileContent, parse_array, parse_json
from patchcore_plugin.bundle.manifest import ORIGINS, SOURCES, THUMBNAILS, BundleError
from patchcore_plugin.errors import writing
from patchcore_plugin.images import read_image
from patchcore_plugin.names import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.bundle.folder import BundleContent
    from patchcore_plugin.bundle.manifest import Manifest, Preprocessing

THUMBNAIL_SIDE = 256
"""Longest side of a thumbnail, in pixels."""

_NAME_LENGTH_LIMIT = 1000  # characters


@dataclass(frozen=True)
class Origins:
    """Origin of each vector of a memory bank.

    Attributes:
        patches: Number of the image, row and column in the patch grid of each bank vector (M, 3), int32.
        images: Images that a bank vector comes from: paths where the model was trained, names (folder/file) in a bundle.
        thumbnails: The part of each image that the network saw, made small (K, h, w, 3), u8, RGB; None without thumbnails.
    """

    patches: NDArray[np.int32]
    images: list[str]
    thumbnails: NDArray[np.uint8] | None = None

    @classmethod
    def of_members(cls, parts: Sequence[Origins | None]) -> Origins | None:
        """Origins of the vectors of an ensemble's banks, member by member; None where a member's are unknown.

        The members know the same images, each of which is named once. Thumbnails are not carried over.
        """
        if len(parts) == 1 or any(part is None for part in parts):
            return parts[0] if len(parts) == 1 else None
        numbers = {image: number for number, image in enumerate(dict.fromkeys(chain(*(part.images for part in parts))))}
        patches = []
        for part in parts:
            own = part.patches.copy()
            own[:, 0] = np.array([numbers[image] for image in part.images], np.int32)[own[:, 0]]
            patches.append(own)
        return cls(np.concatenate(patches), list(numbers))

    def write(self, folder: str | Path) -> None:
        """Write the files of a bundle. Of each image's path they keep the last folder and the file name only, as text."""
        folder = Path(folder)
        with writing(folder / ORIGINS):
            np.save(folder / ORIGINS, np.ascontiguousarray(self.patches, np.int32))
        names = [as_text("/".join(Path(image).parts[-2:])) for image in self.images]
        with writing(folder / SOURCES):
            (folder / SOURCES).write_text(json.dumps(names, indent=0), encoding="utf-8")
        if self.thumbnails is not None:
            with writing(folder / THUMBNAILS):
                np.save(folder / THUMBNAILS, self.thumbnails)


def locate_patches(numbers: NDArray[np.int64], images: Sequence[tuple[str, int, int]]) -> Origins:
    """Find the origins of patches, which are numbered image by image and row by row.

    Args:
        numbers: Numbers of the bank's patches (M,).
        images: Path, rows and columns of the patch grid of every image that was embedded, in order.
    """
    grids = np.array([(rows, columns) for _, rows, columns in images], np.int64)
    ends = np.cumsum(grids.prod(1))
    image = np.searchsorted(ends, numbers, side="right")
    within = numbers - (ends - grids.prod(1))[image]
    used, place = np.unique(image, return_inverse=True)
    columns = grids[image, 1]
    patches = np.stack([place.reshape(-1), within // columns, within % columns], 1).astype(np.int32)
    return Origins(patches, [images[number][0] for number in used])


def read_origins(bundle: BundleContent) -> Origins | None:
    """Read the origins of a bundle's vectors; None where the bundle has none.

    Args:
        bundle: Content of the bundle.

    Raises:
        BundleError: If a file is damaged or does not fit the manifest.
    """
    files, manifest = bundle.files, bundle.manifest
    if ORIGINS not in files:
        return None
    images = _read_names(files[SOURCES])
    patches = _read_patches(files[ORIGINS], manifest, len(images))
    if THUMBNAILS not in files:
        return Origins(patches, images)
    pictures, shape = parse_array(files[THUMBNAILS]), (len(images), *_thumbnail_shape(manifest.preprocessing), 3)
    if pictures.dtype != np.uint8 or pictures.shape != shape:
        msg = f"{files[THUMBNAILS].path} holds {pictures.dtype} values of shape {pictures.shape}, expected uint8 of {shape}."
        raise BundleError(msg)
    return Origins(patches, images, pictures)


def _read_names(file: FileContent) -> list[str]:
    names = parse_json(file)
    if not isinstance(names, list) or not all(
        isinstance(name, str) and 0 < len(name) <= _NAME_LENGTH_LIMIT for name in names
    ):
        msg = f"{file.path} does not hold a list of image names."
        raise BundleError(msg)
    return list(map(as_text, names))  # an answer over HTTP must be able to hold them


def _read_patches(file: FileContent, manifest: Manifest, images: int) -> NDArray[np.int32]:
    patches = parse_array(file)
    if patches.dtype != np.int32 or patches.shape != (manifest.vectors, 3):
        msg = (
            f"{file.path} holds {patches.dtype} values of shape {patches.shape}, expected int32 of "
            f"{(manifest.vectors, 3)}: image, row and column of each bank vector."
        )
        raise BundleError(msg)
    limits = (images, *manifest.grid)
    if patches.min() < 0 or (patches >= limits).any():
        msg = f"{file.path} names an image, row or column out of range; there are {limits} of them."
        raise BundleError(msg)
    return patches


def make_thumbnails(paths: Sequence[str | Path], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Make a small copy of the part of each image that the network sees.

    Args:
        paths: Image files.
        preprocessing: The model's resize and crop.

    Returns:
        Thumbnails (K, h, w, 3), u8, RGB, as of :func:`make_thumbnail`.

    Raises:
        BundleError: If an image file is missing.
        ImageError: If an image cannot be read.
    """
    thumbnails = np.empty((len(paths), *_thumbnail_shape(preprocessing), 3), np.uint8)
    for thumbnail, path in zip(thumbnails, paths, strict=True):
        try:
            thumbnail[:] = make_thumbnail(read_image(path, intensity_range=preprocessing.intensity_range), preprocessing)
        except FileNotFoundError as error:
            msg = f"There is no thumbnail without the image: {path} is missing. Put it back, or leave thumbnails out."
            raise BundleError(msg) from error
    return thumbnails


def make_thumbnail(image: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Make a small copy of the part of an image that the network sees.

    Args:
        image: RGB image (H, W, 3), u8.
        preprocessing: The model's resize and crop.

    Returns:
        Thumbnail (h, w, 3), u8, RGB: as large as the network's input, and at most 256 pixels a side.
    """
    resized = Image.fromarray(image).resize(preprocessing.resize[::-1], Image.Resampling.BILINEAR)
    seen = resized.crop(preprocessing.crop_box.corners)
    return np.asarray(seen.resize(_thumbnail_shape(preprocessing)[::-1], Image.Resampling.BILINEAR))


def _thumbnail_shape(preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of a thumbnail, in pixels."""
    height, width = preprocessing.size
    factor = min(1, THUMBNAIL_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
