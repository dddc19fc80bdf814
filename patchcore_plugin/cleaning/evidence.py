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

SCREENED_PATCHES = 12
"""Patches of an image that are compared with all patches of the other images: those that deviate most at first sight."""

COMPARED_IMAGES = 1000
"""Images that they are compared with, at most: a random draw of more, as the time grows with the square of the images."""

FARTHEST_PATCHES = 3
"""Patches of an image whose mean distance is its score."""

SPREAD_FLOOR = 0.25
"""Least deviation, and least median distance, at a place, as a share of the median over all places."""

SUSPICIOUS_SCORE = 2.0
"""Score above which an image is suspicious, in robust standard deviations above the median of all images."""

_NORMAL_MAD = 0.6745  # median absolute deviation of a standard normal distribution
_QUERY_ROWS = 1024  # of a distance matrix: bounds its memory


class Evidence(NamedTuple):
    """What was found of N images with a patch grid of h x w.

    Attributes:
        scores: Score of each image (N,), float32: robust standard deviations above the median of all images.
        maps: Deviation of each patch (N, h, w), float32, from what is usual at its place.
        patch: Number of the most suspicious patch of each image (N,) in its grid.
        like_image: Number of the image with the nearest like of that patch (N,).
        like_patch: Number of the like in that image's grid (N,).
    """

    scores: NDArray[np.float32]
    maps: NDArray[np.float32]
    patch: NDArray[np.int64]
    like_image: NDArray[np.int64]
    like_patch: NDArray[np.int64]


def find_evidence(embed: Embed, images: int, seed: int = 0, progress: Progress = no_progress) -> Evidence:
    """Score images by the likeness of their patches to those of the other images.

    At first sight, a patch's distance is the mean of its distances to the :data:`LIKE_IMAGES` nearest other images, each by
    its nearest patch among a random few. A border, or a part that varies, is far in all images: so the distance is compared
    with those of all images at the same place of the grid, by median and median absolute deviation.

    The :data:`SCREENED_PATCHES` of an image that deviate most are then compared with all patches of the other images. Their
    distance is that to the last of the :data:`LIKE_IMAGES` nearest images, over the square root of the median distance at
    their place. The mean of an image's :data:`FARTHEST_PATCHES` largest is its score, in robust standard deviations.

    Memory is that of :data:`REFERENCE_LIMIT` embeddings, :data:`SCREENED_PATCHES` for each image, and 8 bytes for each patch
    of all images.

    Args:
        embed: Gives the patch embeddings (h, w, D) of each image in turn. Called several times.
        images: Number of images N, at least 2.
        seed: Seed of the patches and images that are compared with.
        progress: Called with each step.

    Returns:
        Scores, maps and likenesses.
    """
    if images < 2:
        msg = f"An image is compared with others, so at least 2 are needed, got {images}."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    reference = _draw_reference(embed, images, rng, progress)
    distances = np.stack(
        [
            _search(embedding, number, reference)
            for number, embedding in enumerate(_counted(embed(), images, "compare", progress))
        ]
    )
    maps = deviations(distances)
    flat = maps.reshape(images, -1)
    screened = np.argsort(-flat, axis=1, kind="stable")[:, :SCREENED_PATCHES]
    among = np.sort(rng.permutation(images)[:COMPARED_IMAGES])
    exact, like_image, like_patch = _compare(embed, screened, among, progress)
    usual = np.median(distances, axis=0).ravel()
    usual = np.maximum(usual, SPREAD_FLOOR * np.median(usual)) + np.finfo(np.float32).eps
    exact /= np.sqrt(usual)[screened]
    row, worst = np.arange(images), exact.argmax(1)
    scores = largest_mean(exact)
    middle, deviation = robust_scale(scores)
    return Evidence(
        scores=((scores - middle) / max(deviation, np.finfo(np.float32).eps)).astype(np.float32),
        maps=maps,
        patch=screened[row, worst],
        like_image=like_image[row, worst],
        like_patch=like_patch[row, worst],
    )


def deviations(distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far patch distances (N, h, w) lie above the median at their place, in median absolute deviations."""
    middle = np.median(distances, axis=0)
    spread = np.median(np.abs(distances - middle), axis=0)
    floor = SPREAD_FLOOR * np.median(spread) or np.finfo(np.float32).eps
    return ((distances - middle) / (spread + floor)).astype(np.float32)


def largest_mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the :data:`FARTHEST_PATCHES` largest values of each row (N, P)."""
    number = min(FARTHEST_PATCHES, values.shape[1])
    return np.partition(values, -number, axis=1)[:, -number:].mean(1)


def robust_scale(values: NDArray[np.float32]) -> tuple[float, float]:
    """Median and robust standard deviation of values (N,): no share of outliers is assumed but less than half."""
    middle = np.median(values)
    return float(middle), float(np.median(np.abs(values - middle)) / _NORMAL_MAD)


def _draw_reference(embed: Embed, images: int, rng: np.random.Generator, progress: Progress) -> torch.Tensor:
    """Embeddings (N, R, D) of R random patches of each image."""
    each = max(1, min(REFERENCE_PATCHES, REFERENCE_LIMIT // images))
    rows = []
    for embedding in _counted(embed(), images, "embed", progress):
        patches = embedding.reshape(-1, embedding.shape[-1])
        rows.append(patches[torch.from_numpy(rng.permutation(len(patches))[:each]).to(patches.device)].float())
    return torch.stack(rows)


def _search(embedding: torch.Tensor, number: int, reference: torch.Tensor) -> NDArray[np.float32]:
    """Mean distance (h, w) of each patch to the nearest other images."""
    images, each, dimension = reference.shape
    vectors = reference.reshape(-1, dimension)
    lengths = vectors.square().sum(1)
    parts = []
    for queries in embedding.reshape(-1, dimension).float().split(_QUERY_ROWS):
        nearest = torch.addmm(lengths, queries, vectors.T, alpha=-2).reshape(-1, images, each).amin(2)
        nearest[:, number] = torch.inf
        nearest = nearest.topk(min(LIKE_IMAGES, images - 1), dim=1, largest=False).values
        parts.append((nearest + queries.square().sum(1, keepdim=True)).clamp_min(0).sqrt().mean(1))
    return torch.cat(parts).cpu().numpy().reshape(tuple(embedding.shape[:2]))


def _compare(
    embed: Embed, screened: NDArray[np.int64], among: NDArray[np.int64], progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Compare screened patches (N, S) with all patches of the images ``among``.

    Returns:
        Distance (N, S) to the last of the :data:`LIKE_IMAGES` nearest other images; image and patch (N, S) of the nearest.
    """
    images, each = screened.shape
    rows = []
    for number, embedding in enumerate(_counted(embed(), images, "pick", progress)):
        patches = embedding.reshape(-1, embedding.shape[-1])
        rows.append(patches[torch.from_numpy(screened[number]).to(patches.device)].float())
    queries = torch.cat(rows)
    lengths = queries.square().sum(1)
    # of each query, nearest image first: squared distance, and for the nearest of all its image and patch
    best = torch.full((len(queries), min(LIKE_IMAGES, images - 1)), torch.inf, device=queries.device)
    like = torch.zeros((len(queries), 2), dtype=torch.int64, device=queries.device)
    compared = set(among.tolist())
    for number, embedding in enumerate(_counted(embed(), images, "compare exactly", progress)):
        if number not in compared:
            continue
        patches = embedding.reshape(-1, embedding.shape[-1]).float()
        for start in range(0, len(queries), _QUERY_ROWS):
            part = slice(start, start + _QUERY_ROWS)
            squared = torch.addmm(patches.square().sum(1), queries[part], patches.T, alpha=-2) + lengths[part, None]
            nearest = squared.amin(1)
            own = torch.arange(start, start + len(nearest), device=nearest.device) // each == number
            nearest[own] = torch.inf
            closer = torch.nonzero(nearest < best[part, 0])[:, 0]
            like[start + closer, 0] = number
            like[start + closer, 1] = squared[closer].argmin(1)
            joined = torch.cat([best[part], nearest[:, None]], dim=1)
            best[part] = joined.sort(dim=1).values[:, :-1]
    distances = best[:, -1].clamp_min(0).sqrt().cpu().numpy().reshape(images, each)
    like_image, like_patch = like.cpu().numpy().T.reshape(2, images, each)
    return distances, like_image, like_patch


def _counted(embeddings: Iterator[torch.Tensor], images: int, step: str, progress: Progress) -> Iterator[torch.Tensor]:
    progress(step, 0, images)
    for done, embedding in enumerate(embeddings, start=1):
        yield embedding
        progress(step, done, images)
