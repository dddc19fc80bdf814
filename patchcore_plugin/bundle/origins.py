"""Where the vectors of a memory bank come from: the image, and the row and column of its patch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from patchcore_plugin.bundle.manifest import ORIGINS, SOURCES, THUMBNAILS, BundleError
from patchcore_plugin.images import read_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.bundle.manifest import Manifest, Preprocessing

THUMBNAIL = 256
"""Longest side of a thumbnail, in pixels, at most."""

_NAME_LIMIT = 1000  # characters


@dataclass(frozen=True)
class Origins:
    """Where each vector of a memory bank comes from.

    Attributes:
        patches: Number of the image, row and column in the patch grid of each bank vector (M, 3), int32.
        images: The images: paths where the model was trained, names (folder/file) in a bundle. Only those that a bank vector
            comes from.
        thumbnails: The part of each image that the network saw, made small (K, h, w, 3), u8, RGB; None without.
    """

    patches: NDArray[np.int32]
    images: list[str]
    thumbnails: NDArray[np.uint8] | None = None

    def extended(self, more: Origins) -> Origins:
        """These and those of vectors that were added to the bank."""
        shifted = more.patches + np.int32([len(self.images), 0, 0])
        both = self.thumbnails is not None and more.thumbnails is not None
        return Origins(
            np.concatenate([self.patches, shifted]),
            [*self.images, *more.images],
            np.concatenate([self.thumbnails, more.thumbnails]) if both else None,
        )

    def write(self, folder: Path) -> None:
        """Write the bundle's files, with no more of the images' paths than folder and file."""
        np.save(folder / ORIGINS, np.ascontiguousarray(self.patches, np.int32))
        (folder / SOURCES).write_text(json.dumps([name_of(image) for image in self.images], indent=0), encoding="utf-8")
        if self.thumbnails is not None:
            np.save(folder / THUMBNAILS, self.thumbnails)


def of_rows(numbers: NDArray[np.int64], images: Sequence[tuple[str, int, int]]) -> Origins:
    """Origins of patches that are numbered image by image, row by row.

    Args:
        numbers: Of the bank's patches (M,).
        images: Of all images that were embedded, in order, the path, and the rows and columns of the patch grid.
    """
    grids = np.array([(rows, columns) for _, rows, columns in images], np.int64)
    ends = np.cumsum(grids.prod(1))
    image = np.searchsorted(ends, numbers, side="right")
    within = numbers - (ends - grids.prod(1))[image]
    used, place = np.unique(image, return_inverse=True)
    columns = grids[image, 1]
    patches = np.stack([place.reshape(-1), within // columns, within % columns], 1).astype(np.int32)
    return Origins(patches, [images[number][0] for number in used])


def name_of(path: str) -> str:
    """What a bundle says of an image's path: its folder's name and its own."""
    return "/".join(Path(path).parts[-2:])


def thumbnails(paths: Sequence[str | Path], recipe: Preprocessing) -> NDArray[np.uint8]:
    """The part of each image that the network sees, at its size or, where that is larger, at most 256 pixels a side.

    Returns:
        Pictures (K, h, w, 3), u8, RGB.

    Raises:
        BundleError: If an image is not at its path any more.
        ImageError: If one cannot be read.
    """
    (top, left), (height, width) = recipe.offset, recipe.size
    shape = thumbnail_shape(recipe)
    found = np.empty((len(paths), *shape, 3), np.uint8)
    for picture, path in zip(found, paths, strict=True):
        try:
            pixels = read_image(path)
        except FileNotFoundError as error:
            msg = f"The image {path} is not there any more, and thumbnails are made of it. Put it back, or leave them out."
            raise BundleError(msg) from error
        seen = Image.fromarray(pixels).resize(recipe.resize[::-1], Image.Resampling.BILINEAR)
        seen = seen.crop((left, top, left + width, top + height))
        picture[:] = np.asarray(seen.resize(shape[::-1], Image.Resampling.BILINEAR))
    return found


def thumbnail_shape(recipe: Preprocessing) -> tuple[int, int]:
    """Height and width of a thumbnail, in pixels."""
    height, width = recipe.size
    factor = min(1, THUMBNAIL / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def read(folder: Path, manifest: Manifest) -> Origins | None:
    """Read the origins of a bundle's vectors; None where it has none.

    Raises:
        BundleError: If a file is damaged or does not fit the manifest.
    """
    if ORIGINS not in manifest.files:
        return None
    images = _read_names(folder / SOURCES)
    patches = _read_array(folder / ORIGINS)
    if patches.dtype != np.int32 or patches.shape != (manifest.bank_size, 3):
        msg = (
            f"{folder / ORIGINS} holds {patches.dtype} values of shape {patches.shape}, not image, row and column of "
            f"{manifest.bank_size} vectors."
        )
        raise BundleError(msg)
    limits = (len(images), *manifest.grid)
    if patches.min() < 0 or (patches >= limits).any():
        msg = f"{folder / ORIGINS} names an image, row or column out of range; there are {limits} of them."
        raise BundleError(msg)
    if THUMBNAILS not in manifest.files:
        return Origins(patches, images)
    pictures, shape = _read_array(folder / THUMBNAILS), (len(images), *thumbnail_shape(manifest.preprocessing), 3)
    if pictures.dtype != np.uint8 or pictures.shape != shape:
        msg = f"{folder / THUMBNAILS} holds {pictures.dtype} values of shape {pictures.shape}, expected uint8 of {shape}."
        raise BundleError(msg)
    return Origins(patches, images, pictures)


def _read_names(file: Path) -> list[str]:
    try:
        names = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error
    if not isinstance(names, list) or not all(isinstance(name, str) and 0 < len(name) <= _NAME_LIMIT for name in names):
        msg = f"{file} does not hold a list of names of images."
        raise BundleError(msg)
    return names


def _read_array(file: Path) -> NDArray:
    try:
        with file.open("rb") as stream:  # np.load would also open an archive
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error
