"""How far the patches of an image are from those of the other images: evidence that it does not belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from patchcore_plugin.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Embed = Callable[[], Iterator[torch.Tensor]]

REFERENCE_PATCHES = 64
"""Patches of an image that the other images are compared with, at most."""

REFERENCE_LIMIT = 32_768
"""Patches of all images together that are compared with, at most: bounds memory and time."""

LIKE_IMAGES = 2
"""Images that must have a like of a patch: one alone may have the same defect."""

FARTHEST_PATCHES = 3
"""Patches of an image whose mean deviation is its score."""

SPREAD_FLOOR = 0.25
"""Least deviation at a place, as a share of the median over all places."""

SUSPICIOUS_DEVIATIONS = 2.5
"""Robust standard deviations above the median score beyond which an image is suspicious."""

_NORMAL_MAD = 0.6745  # median absolute deviation of a standard normal distribution
_QUERY_ROWS = 1024  # of a distance matrix: bounds its memory


class Evidence(NamedTuple):
    """What was found of N images with a patch grid of h x w.

    Attributes:
        scores: Score of each image (N,), float32; the higher, the more suspicious.
        maps: Deviation of each patch (N, h, w), float32, from what is usual at its place.
        like_image: Number of the image with the nearest like of each patch (N, h, w), int32.
        like_patch: Number of that patch in its image's grid (N, h, w), int32.
    """

    scores: NDArray[np.float32]
    maps: NDArray[np.float32]
    like_image: NDArray[np.int32]
    like_patch: NDArray[np.int32]


def find_evidence(embed: Embed, images: int, seed: int = 0, progress: Progress = no_progress) -> Evidence:
    """Score images by the likeness of their patches to those of the other images.

    A patch's distance is the mean of its distances to the :data:`LIKE_IMAGES` nearest other images, each by its nearest
    patch among a random few. A border, or a part that varies, is far in all images: so the distance is compared with those
    of all images at the same place of the grid, by median and median absolute deviation. An image's score is the mean of
    its :data:`FARTHEST_PATCHES` largest deviations.

    Memory is that of :data:`REFERENCE_LIMIT` embeddings, and 12 bytes for each patch of all images.

    Args:
        embed: Gives the patch embeddings (h, w, D) of each image in turn. Called twice, as those of thousands of images
            would not fit into memory.
        images: Number of images N, at least 2.
        seed: Seed of the patches that are compared with.
        progress: Called with each step.

    Returns:
        Scores, maps and likenesses.
    """
    if images < 2:
        msg = f"An image is compared with others, so at least 2 are needed, got {images}."
        raise ValueError(msg)
    reference, chosen = _draw_reference(embed, images, seed, progress)
    found = [
        _search(embedding, number, reference, chosen)
        for number, embedding in enumerate(_counted(embed(), images, "compare", progress))
    ]
    distances, likes, patches = (np.stack(parts) for parts in zip(*found, strict=True))
    maps = deviations(distances)
    return Evidence(image_scores(maps), maps, likes, patches)


def deviations(distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far patch distances (N, h, w) lie above the median at their place, in median absolute deviations."""
    middle = np.median(distances, axis=0)
    spread = np.median(np.abs(distances - middle), axis=0)
    floor = SPREAD_FLOOR * np.median(spread) or np.finfo(np.float32).eps
    return ((distances - middle) / (spread + floor)).astype(np.float32)


def image_scores(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the largest deviations of each image, from maps (N, h, w)."""
    flat = maps.reshape(len(maps), -1)
    number = min(FARTHEST_PATCHES, flat.shape[1])
    return np.partition(flat, -number, axis=1)[:, -number:].mean(1)


def suspicious_above(scores: NDArray[np.float32]) -> float:
    """Score above which an image is an outlier among the others.

    It is :data:`SUSPICIOUS_DEVIATIONS` robust standard deviations above the median. No share of defective images is assumed
    but that it is below half.
    """
    middle = np.median(scores)
    return float(middle + SUSPICIOUS_DEVIATIONS * np.median(np.abs(scores - middle)) / _NORMAL_MAD)


def _draw_reference(embed: Embed, images: int, seed: int, progress: Progress) -> tuple[torch.Tensor, NDArray[np.int32]]:
    """Embeddings (N, R, D) of R random patches of each image, and the patches' numbers (N, R)."""
    rng = np.random.default_rng(seed)
    each = max(1, min(REFERENCE_PATCHES, REFERENCE_LIMIT // images))
    rows, chosen = [], []
    for embedding in _counted(embed(), images, "embed", progress):
        patches = embedding.reshape(-1, embedding.shape[-1])
        chosen.append(np.sort(rng.permutation(len(patches))[:each]).astype(np.int32))
        rows.append(patches[torch.from_numpy(chosen[-1]).to(patches.device)].float())
    return torch.stack(rows), np.stack(chosen)


def _search(
    embedding: torch.Tensor, number: int, reference: torch.Tensor, chosen: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Distance (h, w) of each patch to the nearest other images, and image and patch of the nearest likeness."""
    images, each, dimension = reference.shape
    vectors = reference.reshape(-1, dimension)
    lengths = vectors.square().sum(1)
    parts = []
    for queries in embedding.reshape(-1, dimension).float().split(_QUERY_ROWS):
        squared = torch.addmm(lengths, queries, vectors.T, alpha=-2).reshape(-1, images, each)
        nearest = squared.amin(2)  # min(2), which gives positions too, takes several times as long
        nearest[:, number] = torch.inf
        nearest, image = nearest.topk(min(LIKE_IMAGES, images - 1), dim=1, largest=False)
        nearest = (nearest + queries.square().sum(1, keepdim=True)).clamp_min(0).sqrt().mean(1)
        image = image[:, 0]
        position = squared[torch.arange(len(image), device=image.device), image].argmin(1)
        parts.append((nearest, image, position))
    distances, image, position = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    grid = tuple(embedding.shape[:2])
    patch = chosen[image, position]
    return distances.reshape(grid), image.astype(np.int32).reshape(grid), patch.astype(np.int32).reshape(grid)


def _counted(embeddings: Iterator[torch.Tensor], images: int, step: str, progress: Progress) -> Iterator[torch.Tensor]:
    progress(step, 0, images)
    for done, embedding in enumerate(embeddings, start=1):
        yield embedding
        progress(step, done, images)
