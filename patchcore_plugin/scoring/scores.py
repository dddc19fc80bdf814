"""PatchCore's scores: image score and anomaly map from patch distances, written once for NumPy arrays and torch tensors.

Source: Roth et al., arXiv 2106.08265, section 3.3. The functions follow the Python array API standard, so the runtime calls
them without torch, and the training model can be traced through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from patchcore_plugin.bundle import MAX_NEIGHBORS, MAX_SMOOTHING
from patchcore_plugin.checks import check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import Manifest, RegionOfInterest

SIGMA = 4.0
"""Standard deviation, in pixels, of the Gaussian that smooths the anomaly map (section 3.3 of the paper)."""

_LEAST_PRESENCE = 1e-3  # share of a pixel's value that comes from inspected patches
_SINGLE_THREAD_MULTIPLICATIONS = 2**17  # of one matrix product; OpenBLAS uses several threads from 2**18 on


@dataclass(frozen=True)
class ScoreRule:
    """How patch distances become an image score.

    Attributes:
        num_neighbors: Number of neighbors of the nearest bank vector that re-weight the image score (equation 7); 1 turns
            the weight off.
        score_smoothing: Standard deviation, in patches, of a Gaussian that smooths the distances before their largest
            becomes the image score: a defect covers several patches, and a single patch that stands out is often chance. 0
            turns smoothing off, as in the paper.
        region: Pixels of the network's input that are inspected; patches outside have no distance, and count as 0. None
            inspects all.

    Raises:
        UsageError: If a value is out of range.
    """

    num_neighbors: int = 9
    score_smoothing: float = 0
    region: RegionOfInterest | None = None

    def __post_init__(self) -> None:
        check_number("num_neighbors", self.num_neighbors, 1, MAX_NEIGHBORS, whole=True)
        check_number(
            "score_smoothing",
            self.score_smoothing,
            0,
            MAX_SMOOTHING,
            hint="1 smooths over about five by five patches, 0 not at all.",
        )

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Read the rule from the manifest of a bundle."""
        return cls(manifest.num_neighbors, manifest.score_smoothing, manifest.preprocessing.region)

    def __str__(self) -> str:
        """The rule in words."""
        smoothed = (
            f", smoothed by {self.score_smoothing:g} patch{'es' * (self.score_smoothing != 1)}"
            if self.score_smoothing
            else ""
        )
        weighted = f", re-weighted by {self.num_neighbors} neighbors" if self.num_neighbors > 1 else ""
        where = "" if self.region is None else " in the region of interest"
        return f"largest patch distance{where}{smoothed}{weighted}"

    def inspected(self, embedding: Any) -> Any:
        """Embeddings (B, 1, P, D) of the inspected patches, row by row, among those of all (B, h, w, D)."""
        if self.region is None:
            return embedding
        images, height, width, values = embedding.shape
        numbers = self.region.patches((int(height), int(width)))
        if not isinstance(embedding, np.ndarray):
            numbers = embedding.new_tensor(numbers, dtype=array_namespace(embedding).int64)
        return embedding.reshape(images, height * width, values)[:, None, numbers]

    def on_grid(self, distances: Any, grid: tuple[int, int]) -> Any:
        """Distances (B, h, w) of all patches, from those (B, 1, P) of the inspected ones; outside they are 0."""
        if self.region is None:
            return distances
        # place of each patch among the inspected ones; those outside take any, and are multiplied by 0
        inside = self.region.at(grid)
        places = np.where(inside, np.cumsum(inside).reshape(grid) - 1, 0).ravel()
        factor = inside.astype(np.float32)
        if not isinstance(distances, np.ndarray):
            places = distances.new_tensor(places, dtype=array_namespace(distances).int64)
            factor = distances.new_tensor(factor)
        return distances[:, 0, places].reshape(-1, *grid) * factor


class Scores(NamedTuple):
    """Raw anomaly scores of a batch.

    Attributes:
        image: Image scores (B,), float32.
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32, in feature units.
    """

    image: Any
    patch: Any


def image_score(patch: Any, rule: ScoreRule) -> Any:
    """Largest patch distance of each image, after the rule's smoothing: the image score before equation 7.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32.
        rule: How the model scores images.

    Returns:
        Distances (B,), float32.
    """
    xp = array_namespace(patch)
    _, height, width = patch.shape
    if rule.score_smoothing:
        patch = anomaly_map(patch, (height, width), sigma=rule.score_smoothing, region=rule.region)
    return xp.max(xp.reshape(patch, (-1, height * width)), axis=1)


def farthest_patches(patch: Any) -> Any:
    """Find each image's farthest patch.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w).

    Returns:
        Number of the patch (B,), int64, counted image by image and row by row over the whole batch.
    """
    xp = array_namespace(patch)
    images, height, width = patch.shape
    first = height * width * xp.arange(images, dtype=xp.int64, device=device(patch))
    return xp.argmax(xp.reshape(patch, (-1, height * width)), axis=1) + first


def reweight(distance: Any, support: Any) -> Any:
    """Weigh image scores by equation 7 of the paper.

    Args:
        distance: Image score to weigh (B,): the distance s* of the farthest patch to its nearest bank vector m*, or the
            largest smoothed distance.
        support: Distances (B, b) of the farthest patch to the b nearest neighbors of m* in the bank, m* itself the first.

    Returns:
        ``(1 - exp(s*) / sum(exp(support))) * distance`` (B,). With one neighbor, ``distance`` itself.
    """
    if support.shape[1] == 1:
        return distance
    xp = array_namespace(distance)
    shift = xp.max(support, axis=1)  # the largest exponent is then 0: nothing overflows
    weight = 1 - xp.exp(support[:, 0] - shift) / xp.sum(xp.exp(support - shift[:, None]), axis=1)
    return weight * distance


def weighted_mean(distances: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Mean of the distances of an ensemble's members, each multiplied by the member's weight.

    Args:
        distances: Distances by each member, all of one shape.
        weights: Weight of each member; the first is 1.

    Returns:
        Distances in feature units of the first member; of a single member its own, untouched.
    """
    total = distances[0]
    if len(distances) == 1:
        return total
    for distance, weight in zip(distances[1:], weights[1:], strict=True):
        total = total + weight * distance
    return total / len(distances)


def anomaly_map(
    patch: Any,
    size: tuple[int, int],
    upsampling: str = "bilinear",
    sigma: float = SIGMA,
    region: RegionOfInterest | None = None,
) -> Any:
    """Upsample and smooth patch distances to an anomaly map.

    Both steps are linear and separable, so each axis is one matrix, and the map takes two small matrix products. With a
    region of interest, the map is a mean over the inspected patches alone, and 0 outside.

    Args:
        patch: Patch distances (B, h, w), float32.
        size: Height and width of the map, in pixels.
        upsampling: ``"bilinear"`` as in the paper, or ``"nearest"`` as in anomalib's ``Patchcore``.
        sigma: Standard deviation of the Gaussian, in pixels of the map.
        region: Pixels that are inspected; None inspects all.

    Returns:
        Anomaly map (B, H, W), float32, in feature units.
    """
    rows = _axis_matrix(patch.shape[1], size[0], upsampling, sigma)
    columns = _axis_matrix(patch.shape[2], size[1], upsampling, sigma).T
    if isinstance(patch, np.ndarray):
        # in products so small that BLAS uses one thread: more would wait actively afterwards, and slow what runs next
        step = max(1, _SINGLE_THREAD_MULTIPLICATIONS // (patch.shape[2] * max(patch.shape[1], size[1])))
        smoothed = np.empty((len(patch), *size), np.float32)
        for first in range(0, size[0], step):
            np.matmul(rows[first : first + step] @ patch, columns, out=smoothed[:, first : first + step])
    else:
        smoothed = patch.new_tensor(rows) @ patch @ patch.new_tensor(columns)
    if region is None:
        return smoothed
    factor = _region_factor(region, tuple(patch.shape[1:]), size, upsampling, sigma)
    return smoothed * (factor if isinstance(patch, np.ndarray) else patch.new_tensor(factor))


def map_mean(
    patch: NDArray[np.float32], size: tuple[int, int], region: RegionOfInterest | None = None
) -> NDArray[np.float32]:
    """Mean of each :func:`anomaly_map`, computed without the map, which is linear in the patches.

    Args:
        patch: Patch distances (B, h, w), float32.
        size: Height and width of the map, in pixels.
        region: Pixels that are inspected; None inspects all.

    Returns:
        Means (B,), float32.
    """
    if region is not None:
        rows, columns = (_axis_matrix(*lengths, "bilinear", SIGMA) for lengths in zip(patch.shape[1:], size, strict=True))
        weights = rows.T @ _region_factor(region, patch.shape[1:], size, "bilinear", SIGMA) @ columns
        return (patch * (weights / (size[0] * size[1]))).sum((1, 2))
    rows, columns = (
        _axis_matrix(patches, pixels, "bilinear", SIGMA).mean(0)
        for patches, pixels in zip(patch.shape[1:], size, strict=True)
    )
    return (patch @ columns) @ rows


@lru_cache(maxsize=32)
def _region_factor(
    region: RegionOfInterest, grid: tuple[int, int], size: tuple[int, int], upsampling: str, sigma: float
) -> NDArray[np.float32]:
    """What smoothed values (H, W), to which patches outside gave 0, are multiplied by: 0 outside.

    A pixel's value becomes the mean of the inspected patches that it depends on. Where there is hardly one, it is 0.
    """
    present = anomaly_map(region.at(grid).astype(np.float32)[None], size, upsampling, sigma)[0]
    return np.where(region.at(size) & (present > _LEAST_PRESENCE), 1 / np.maximum(present, _LEAST_PRESENCE), 0).astype(
        np.float32
    )


@lru_cache(maxsize=32)
def _axis_matrix(patches: int, pixels: int, upsampling: str, sigma: float) -> NDArray[np.float32]:
    """Matrix (pixels, patches) that upsamples one axis, then smooths it with a Gaussian that is cut at four sigma."""
    centers = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    if upsampling == "nearest":
        upsample = np.eye(patches)[np.arange(pixels) * patches // pixels]
    elif upsampling == "bilinear":
        offset = np.clip(centers, 0, patches - 1)[:, None] - np.arange(patches)
        upsample = np.clip(1 - np.abs(offset), 0, None)
    else:
        msg = f"upsampling must be 'bilinear' or 'nearest', got {upsampling!r}."
        raise ValueError(msg)
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # the image is mirrored at its border: np.pad says which pixel stands outside
    source = np.pad(np.arange(pixels), reach, mode="reflect" if pixels > 1 else "edge")
    smoothed = sum(weight * upsample[source[tap : tap + pixels]] for tap, weight in enumerate(kernel))
    return smoothed.astype(np.float32)
